"""The sweep: read a block, quantize it, store it, send the text through what was stored, free it, and go on.

Peak memory is one block, the next one being read, its working copies, and the hidden states under their budget. A
killed run comes back here too: finished blocks are read from their shards and only propagated.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.files import read_shard, write_json, write_shard
from ..modules.linear import install
from .block import Outcome, Text, quantize_block
from .checkpoint import Checkpoint, Prefetch, check_finite, free
from .hidden import HiddenStates, micro_batches
from .plan import Plan
from .prologue import Calls, run_prologue
from .run import NAMES, SCRATCH, RunDirectory

MICRO_BATCH = 2048
"""Tokens sent through a block at once. It is part of the plan: another size would sum statistics in another order."""
SNAPSHOT_SECONDS = 180.0
"""Hidden states are saved this often, so that a restart does not replay a long run's every finished block."""


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
    progress: Progress = field(default_factory=Progress)

    @torch.no_grad()
    def execute(self) -> None:
        """Do what is not yet done. Afterwards the run directory is complete."""
        gc.freeze()  # what exists now outlives the run: collecting between blocks need not look at it
        anatomy, count = self.plan.anatomy, len(self.plan.anatomy.blocks)
        finished = self.run.finished()
        self._write_rest()
        calls, hidden, start = None, None, finished
        if self.plan.recipe.calibrated and finished < count:
            calls, hidden, start = self._begin(finished)
        saver = _Snapshots(self.run, hidden)
        with Prefetch(self.checkpoint) as ahead:
            if finished < count:
                ahead.start(self._names(finished))
            for index in range(start, count):
                block = self.model.get_submodule(anatomy.full_name(index, ""))
                text = None if calls is None or hidden is None else self._text(calls, hidden, index)
                if index < finished:
                    layers, rest = self.run.read_block(index, anatomy.full_name(index, ""))
                    install(block, layers, rest, self.dtype, self.device)
                else:
                    self.progress.block(index, count, None)
                    self._quantize(index, block, ahead, text)
                if text is not None and hidden is not None and index + 1 < count:
                    for batch in range(text.batches):
                        hidden[batch] = text.forward(block, batch)
                    saver.maybe_save(index + 1)
                free(block)
                _release_memory()
        saver.wait()
        if hidden is not None:
            hidden.clear()
        self.run.finish()

    def _quantize(self, index: int, block: nn.Module, ahead: Prefetch, text: Text | None) -> None:
        began = time.perf_counter()
        anatomy, prefix = self.plan.anatomy, self.plan.anatomy.full_name(index, "")
        tensors = {name[len(prefix) + 1 :]: tensor for name, tensor in ahead.result().items()}
        if index + 1 < len(anatomy.blocks):
            ahead.start(self._names(index + 1))
        for name, tensor in tensors.items():
            check_finite(f"{prefix}.{name}", tensor)
        outcome = quantize_block(
            block,
            anatomy.blocks[index],
            tensors,
            self.plan.recipe,
            self.plan.formats[index],
            text,
            self.dtype,
            self.device,
        )
        report = _report(prefix, outcome)
        self.run.write_block(index, prefix, outcome.layers, outcome.rest, report)
        seconds = time.perf_counter() - began
        self.run.log({"block": prefix, "seconds": round(seconds, 3)})
        self.progress.block(index, len(anatomy.blocks), {**report, "seconds": seconds})

    def _begin(self, finished: int) -> tuple[Calls, HiddenStates, int]:
        """Arguments of every block and the hidden states to go on from: (calls, states, block they are inputs of)."""
        batches = micro_batches(list(self.windows), MICRO_BATCH)
        hidden = HiddenStates(self.hidden_budget, self.run.path / SCRATCH)
        calls = run_prologue(self.model, self.plan.anatomy, self.checkpoint, batches, hidden, self.dtype, self.device)
        for block in range(finished, 0, -1):
            snapshot = snapshot_path(self.run, block)
            if snapshot.exists():
                hidden.restore(read_shard(snapshot))
                return calls, hidden, block
        return calls, hidden, 0

    def _text(self, calls: Calls, hidden: HiddenStates, index: int) -> Text:
        def forward(block: nn.Module, batch: int) -> Tensor:
            return calls.run(block, index, batch, hidden[batch].to(self.device))

        return Text(forward, len(hidden), hidden[0].shape[0] * hidden[0].shape[1])

    def _names(self, index: int) -> tuple[str, ...]:
        return self.checkpoint.names(self.plan.anatomy.full_name(index, "") + ".")

    def _write_rest(self) -> None:
        """Everything outside the blocks, as it is in the checkpoint, and the names that export gives back."""
        if not self.run.shard(0).exists():
            inside = f"{self.plan.anatomy.layers}."
            names = [n for n in self.checkpoint.names() if not n.startswith(inside) and n not in self.checkpoint.tied]
            write_shard(self.run.shard(0), {name: self.checkpoint.streamed(name) for name in names})
        if not (self.run.path / NAMES).exists():
            write_json(self.run.path / NAMES, checkpoint_names(self.checkpoint))


def checkpoint_names(checkpoint: Checkpoint) -> dict[str, list[tuple[str, int, bool]]]:
    """Parameter -> its pieces' (checkpoint name, rows, transposed), where they are not simply itself."""
    names = {}
    for name in checkpoint.names():
        pieces = [
            (piece.name, len(piece.columns if piece.transposed else piece.rows), piece.transposed)
            for piece in checkpoint.pieces(name)
        ]
        if len(pieces) > 1 or pieces[0][0] != name or pieces[0][2]:
            names[name] = pieces
    return names


def snapshot_path(run: RunDirectory, block: int) -> Path:
    """Where the inputs of `block` are kept for a restart."""
    return run.path / f"hidden-{block:05d}.safetensors"


class _Snapshots:
    """Saves the hidden states now and then, in the background; only the newest file is kept."""

    def __init__(self, run: RunDirectory, hidden: HiddenStates | None) -> None:
        self._run, self._hidden = run, hidden
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def maybe_save(self, block: int) -> None:
        """Save the inputs of `block` if the last snapshot is old enough and done."""
        if self._hidden is None or time.monotonic() - self._last < SNAPSHOT_SECONDS:
            return
        self.wait()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._save, args=(block, self._hidden.snapshot()), daemon=True)
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


def _release_memory() -> None:
    """Give freed pages back to the system: glibc keeps them, and the next block would come on top."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
