"""The sweep: read a block, quantize it, store it, send the text through what was stored, free it, and go on.

Peak memory is one block, the next one being read, its working copies, and the hidden states under their budget. A
killed run comes back here too: finished blocks are read from their shards and only propagated.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..formats.files import Streamed, read_shard, write_json, write_shard
from ..graph.anatomy import Anatomy
from ..methods.base import LearnedRotation
from ..methods.recipe import Recipe
from ..modules.linear import install
from .block import Outcome, quantize_block
from .checkpoint import Checkpoint, Prefetch, check_finite, free
from .hidden import HiddenStates, micro_batches
from .lanes import ALONE, Lanes
from .learning import WholeModel
from .memory import at_home, gpu_room, release_memory, settled
from .plan import Plan
from .prologue import run_prologue
from .rotation import Turning, unties
from .run import NAMES, ROTATION, SCRATCH, RunDirectory, checkpoint_names
from .text import Streams, Text
from .work import BlockWork

MICRO_BATCH = 2048
"""Tokens sent through a block at once. It is part of the plan: another size would sum statistics in another order."""
EXPERT_TOKENS = 1024
"""Tokens that an expert is to see at once on a GPU, which otherwise waits for one small product after the other."""
MOST_AT_ONCE = 4
"""Micro-batches that may be taken as one for that; a mixture's inner states are several times a dense block's."""
SNAPSHOT_SECONDS = 180.0
"""Hidden states are saved this often, so that a restart does not replay a long run's every finished block."""


def micro_batch(anatomy: Anatomy, recipe: Recipe, device: torch.device) -> int:
    """Tokens sent through a block at once: more of them where a GPU runs many experts, unless a method trains by them.

    Of E experts each is taken to see two tokens in E, which is the least that mixtures send them.
    """
    experts = max(len({site.expert for site in block.sites} - {None}) for block in anatomy.blocks)
    if device.type != "cuda" or recipe.reconstruct:
        return MICRO_BATCH
    return MICRO_BATCH * max(1, min(MOST_AT_ONCE, EXPERT_TOKENS * experts // (2 * MICRO_BATCH)))


@dataclass(frozen=True)
class Progress:
    """What the sweep tells whoever watches: (block, count, its report or None when it starts)."""

    block: Callable[[int, int, Mapping[str, Any] | None], None] = lambda *_: None


@dataclass
class Sweep:
    """One run of a plan over a bound checkpoint into a run directory."""

    plan: Plan
    model: nn.Module
    checkpoint: Checkpoint
    run: RunDirectory
    windows: Sequence[Tensor]
    """Calibration windows of token ids; unused by recipes that need no text."""
    dtype: torch.dtype
    device: torch.device
    hidden_budget: int
    gpu_budget: int | None = None
    """Bytes of a GPU that the run may take; None for all that are free."""
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    lanes: Lanes = ALONE
    """The processes that share the run; every one of them carries out a sweep, and the first one writes."""
    _turning: Turning | None = field(default=None, init=False)

    @torch.no_grad()
    @settled()  # collecting between blocks need not look at what was there before
    def execute(self) -> None:
        """Do what is not yet done. Afterwards the run directory is complete."""
        anatomy, count = self.plan.anatomy, len(self.plan.anatomy.blocks)
        finished, begun = self.lanes.agreed((self.run.finished(), self.run.shard(0).exists()))
        if finished < count or not begun:
            self._turning = self._find_turning()
        if self.lanes.first:
            self._write_rest()
        streams, start = None, finished
        if self.plan.recipe.calibrated and finished < count:
            streams, start = self._begin(finished)
        saver = _Snapshots(self.run, streams if self.lanes.alone else None)
        with Prefetch(self.checkpoint, self.device) as ahead, _Writer(self.device.type == "cuda") as writer:
            if start < count and (start == finished or self.plan.recipe.float_stream):
                ahead.start(self._names(start))
            for index in range(start, count):
                advanced = False
                block = self.model.get_submodule(anatomy.full_name(index, ""))
                text = None if streams is None else streams.text(index)
                if index < finished:
                    self._replay(index, block, ahead, text, count, finished)
                else:
                    self.progress.block(index, count, None)
                    advanced = self._quantize(index, block, ahead, text, writer).advanced
                if text is not None and streams is not None and index + 1 < count:
                    streams.advance(text, None if advanced else block)
                    saver.maybe_save(index + 1)
                free(block)
                gc.collect()
                release_memory()
        saver.wait()
        if streams is not None:
            streams.clear()
        self.lanes.gathered(None)  # nobody reads or clears anything any more
        if self.lanes.first:
            self.run.finish()
        self.lanes.agreed(None)

    def _replay(
        self, index: int, block: nn.Module, ahead: Prefetch, text: Text | None, count: int, finished: int
    ) -> None:
        """Make a finished block ready to be propagated through: from its shard, and from the source for the floats."""
        if self.plan.recipe.float_stream and text is not None:
            self._work(index, block, self._tensors(index, ahead)).install_dense()
            text.fill_targets(block)
        elif index + 1 == finished and finished < count:
            ahead.start(self._names(finished))
        layers, rest = self.run.read_block(index, self.plan.anatomy.full_name(index, ""))
        install(block, layers, rest, self.dtype, self.device)

    def _tensors(self, index: int, ahead: Prefetch) -> dict[str, Tensor]:
        """The block's checkpoint tensors by name within it, on the device; the next block's reading begins."""
        cut = len(self.plan.anatomy.full_name(index, "")) + 1
        tensors = {name[cut:]: tensor.to(self.device, non_blocking=True) for name, tensor in ahead.result().items()}
        if index + 1 < len(self.plan.anatomy.blocks):
            ahead.start(self._names(index + 1))
        return tensors

    def _quantize(self, index: int, block: nn.Module, ahead: Prefetch, text: Text | None, writer: _Writer) -> Outcome:
        began = time.perf_counter()
        anatomy, prefix = self.plan.anatomy, self.plan.anatomy.full_name(index, "")
        tensors = self._tensors(index, ahead)
        for name, tensor in tensors.items():
            check_finite(f"{prefix}.{name}", tensor)
        work = self._work(index, block, tensors)
        outcome = quantize_block(work, text, seed=self.seed * 100_003 + index)
        if not self.lanes.first:
            return outcome
        report = _report(prefix, outcome)
        writer.start(partial(self.run.write_block, index, prefix, outcome.layers, outcome.rest, report))
        seconds = time.perf_counter() - began
        self.run.log({"block": prefix, "seconds": round(seconds, 3)})
        self.progress.block(index, len(anatomy.blocks), {**report, "seconds": seconds})
        return outcome

    def _work(self, index: int, block: nn.Module, tensors: Mapping[str, Tensor]) -> BlockWork:
        """The work on a block, which begins with the rotation of the whole model if there is one."""
        part, formats = self.plan.anatomy.blocks[index], self.plan.formats[index]
        work = BlockWork(block, part, self.plan.recipe, formats, tensors, self.dtype, self.device)
        work.place, work.lanes = (index, len(self.plan.anatomy.blocks)), self.lanes
        work.stack_bytes = self.plan.stack_bytes
        if self._turning is not None:
            self._turning.turn(work, index)
        return work

    def _find_turning(self) -> Turning | None:
        """The recipe's rotation with its matrices; learned ones are kept in the run directory."""
        rotation, anatomy = self.plan.recipe.rotation, self.plan.anatomy
        if rotation is None:
            return None
        matrices = self._learned(rotation) if isinstance(rotation, LearnedRotation) else rotation.matrices(anatomy)
        return Turning(rotation, matrices, anatomy, self.checkpoint, self.device)

    def _learned(self, rotation: LearnedRotation) -> dict[str, Tensor]:
        """The matrices that a rotation learned on the text, here or before a restart."""
        file = self.run.path / ROTATION
        if not file.exists():
            began = time.perf_counter()
            plan, names = self.plan, self.checkpoint.names()
            for name, tensor in self.checkpoint.read(names).items():
                check_finite(name, tensor)
            view = WholeModel(
                self.model, plan.anatomy, plan.recipe, plan.formats, self.checkpoint, self.windows, self.device
            )
            with torch.enable_grad():
                matrices, losses = rotation.learn(view)
            view.release()
            release_memory()
            file.parent.mkdir(exist_ok=True)
            write_shard(file, {name: matrix.cpu() for name, matrix in matrices.items()})
            seconds = round(time.perf_counter() - began, 3)
            self.run.log({"rotation": rotation.name, "losses": losses, "seconds": seconds})
        return read_shard(file)

    def _begin(self, finished: int) -> tuple[Streams, int]:
        """The hidden states to go on from, and the block that they are inputs of."""
        tokens = micro_batch(self.plan.anatomy, self.plan.recipe, self.device)
        batches = micro_batches(list(self.windows), tokens)
        self.lanes = self.lanes.of(batches)
        scratch = self.run.path / SCRATCH / f"{self.lanes.rank}"
        trains = self.plan.recipe.float_stream
        share = self.hidden_budget // 3 if trains else self.hidden_budget
        home = self._home()
        hidden = HiddenStates(share, scratch / "quantized", home)
        calls = run_prologue(
            self.model,
            self.plan.anatomy,
            self.checkpoint,
            [batches[index] for index in self.lanes.here],
            hidden,
            self.dtype,
            self.device,
            *(() if self._turning is None else (self._turning.rows,)),
        )
        streams = Streams(calls, hidden, self.device, self._spare)
        if trains:
            streams.split(share, scratch, home)
        for block in range(finished if self.lanes.alone else 0, 0, -1):
            snapshot = snapshot_path(self.run, block)
            if snapshot.exists():
                streams.restore(read_shard(snapshot))
                return streams, block
        return streams, 0

    def _home(self) -> torch.device:
        """Where hidden states live: on the GPU if they are at home there."""
        own = self.plan.hidden_bytes // self.lanes.world
        if self.device.type == "cuda" and at_home(own, gpu_room(self.device, self.gpu_budget)):
            return self.device
        return torch.device("cpu")

    def _spare(self, taken: int) -> int:
        """Bytes that may be kept between the passes over a block, `taken` being the hidden states in memory.

        On a GPU it is half of what the work on the block leaves.
        """
        spare = self.hidden_budget - taken
        if self.device.type == "cuda":
            work = self.plan.working_bytes + self.plan.stack_bytes
            spare = min(spare, (gpu_room(self.device, self.gpu_budget) - work) // 2)
        return max(0, spare)

    def _names(self, index: int) -> tuple[str, ...]:
        return self.checkpoint.names(self.plan.anatomy.full_name(index, "") + ".")

    def _write_rest(self) -> None:
        """Everything outside the blocks, rotated if the recipe says so, and the names that export gives back."""
        if not self.run.shard(0).exists():
            write_shard(self.run.shard(0), self._rest() if self._turning is None else self._turning.stored())
        if not (self.run.path / NAMES).exists():
            names = checkpoint_names(self.checkpoint)
            if unties(self.plan.anatomy, self.plan.recipe):
                names.pop(f"{self.plan.anatomy.head}.weight", None)  # the files knew it as the embedding
            write_json(self.run.path / NAMES, names)

    def _rest(self) -> dict[str, Tensor | Streamed]:
        inside = f"{self.plan.anatomy.layers}."
        names = [n for n in self.checkpoint.names() if not n.startswith(inside) and n not in self.checkpoint.tied]
        return {name: self.checkpoint.streamed(name) for name in names}


def snapshot_path(run: RunDirectory, block: int) -> Path:
    """Where the inputs of `block` are kept for a restart."""
    return run.path / f"hidden-{block:05d}.safetensors"


class _Writer:
    """Writes a finished block while the next one is worked on, never more than one behind; or at once.

    Where a GPU works, the CPU is free to pack codes. Leaving it waits for what is being written, also after an error:
    a block that was finished stays finished.
    """

    def __init__(self, behind: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lowbit-write") if behind else None
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write; raises what writing the block before has raised."""
        if self._pool is None:
            write()
            return
        self._wait()
        self._pending = self._pool.submit(write)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if error is None:
            self._wait()


class _Snapshots:
    """Saves the hidden states now and then, in the background; only the newest file is kept."""

    def __init__(self, run: RunDirectory, streams: Streams | None) -> None:
        self._run, self._streams = run, streams
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def maybe_save(self, block: int) -> None:
        """Save the inputs of `block` if the last snapshot is old enough and done."""
        if self._streams is None or time.monotonic() - self._last < SNAPSHOT_SECONDS:
            return
        self.wait()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._save, args=(block, self._streams.snapshot()), daemon=True)
        self._thread.start()

    def _save(self, block: int, states: dict[str, Tensor]) -> None:
        path = snapshot_path(self._run, block)
        write_shard(path, states)
        for other in self._run.path.glob("hidden-*.safetensors"):
            if other != path:
                other.unlink(missing_ok=True)

    def wait(self) -> None:
        """Until the snapshot being written is complete."""
        if self._thread is not None:
            self._thread.join()


def _report(name: str, outcome: Outcome) -> dict[str, Any]:
    report: dict[str, Any] = {
        "name": name,
        "error_before": outcome.error_before,
        "error_after": outcome.error_after,
        "error_of": outcome.measure,
    }
    if outcome.experts:
        report["experts"] = {"tokens": outcome.experts, "rounded_to_nearest": outcome.starved}
    return report
