"""Calibration by several processes with a GPU each: who does what, and how they come to the codes of one alone.

fp32 sums depend on their order, so the order is the plan's and not the machine's. Micro-batches belong to *lanes*, runs
of the text; every statistic is summed within its lane, and the lanes' sums are added one behind the other. Any number
of processes that divides the lanes then gives the bits of one process with as many lanes.

Every process reads every block, but holds the hidden states of its own lanes alone and sends only those through it.
Linears behind one input are rounded by one process, since the factor of a Gram matrix, which takes longest, cannot be
shared; the others are handed the codes. One operation hands over whatever there is (`spread`): a value is pickled
without its tensors, which go from device to device. The first process alone writes.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..methods.base import LearnedRotation
from ..methods.recipe import Recipe
from ..methods.views import Need, Stats

PATIENCE = timedelta(hours=2)
"""How long a process waits for another, which may be rounding a huge linear. Whoever started them notices a death."""


class Lost(RuntimeError):
    """Another process has gone: what happened there is the error to show."""


class Tally:
    """Statistics of one tap as they are summed here, lane by lane."""

    def __init__(self, needs: frozenset[Need], joined: bool) -> None:
        self._needs, self._joined = needs, joined
        self._sums = [Stats.observing(needs)]

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """See `Stats.update`."""
        self._sums[-1].update(x, original)

    def turn(self) -> None:
        """What comes now belongs to the next lane."""
        self._join()
        self._sums.append(Stats.observing(self._needs))

    def sums(self) -> list[Stats]:
        """The lanes' statistics; those at the beginning of the text need not be kept apart, and are added up."""
        self._join()
        return self._sums

    def _join(self) -> None:
        if self._joined and len(self._sums) == 2:
            self._sums[0].merge(self._sums.pop())


@dataclass(frozen=True)
class Lanes:
    """The lanes of a run, and which of its processes this is: by default the only one, with one lane."""

    count: int = 1
    rank: int = 0
    world: int = 1
    sizes: tuple[int, ...] = ()
    """Tokens of every micro-batch of the text, wherever that is."""

    @property
    def first(self) -> bool:
        """Whether this process has the beginning of the text, and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    # --- the text -----------------------------------------------------------------------------------------------------

    def of(self, batches: Sequence[Tensor]) -> Lanes:
        """The lanes of a text in micro-batches of ids [b, T]. Raises ValueError where some would be empty."""
        if len(batches) < self.count:
            raise ValueError(
                f"the calibration text makes {len(batches)} micro-batches, too few for {self.count} lanes: "
                "raise --samples, or lower --lanes and --gpus"
            )
        return replace(self, sizes=tuple(batch.numel() for batch in batches))

    @property
    def here(self) -> range:
        """The micro-batches of this process."""
        return range(self._starts[0], self._starts[-1])

    @property
    def turns(self) -> frozenset[int]:
        """Of this process's micro-batches, counted from 0, those with which another lane of its own begins."""
        first, *inner, _ = self._starts
        return frozenset(start - first for start in inner)

    @property
    def _starts(self) -> list[int]:
        """Where the lanes of this process begin in the text, and where the last one ends."""
        each = self.count // self.world
        lanes = range(self.rank * each, (self.rank + 1) * each + 1)
        return [len(self.sizes) * lane // self.count for lane in lanes]

    def tally(self, needs: frozenset[Need]) -> Tally:
        """Empty statistics of one tap."""
        return Tally(needs, self.first)

    def total(self, tally: Tally) -> Stats:
        """The statistics over the whole text, lanes added in their order."""
        sums = tally.sums()
        total: Stats = self.spread(sums[0], 0)
        for rank in range(1, self.world):
            for lane in range(self.count // self.world):
                total.merge(self.spread(sums[lane] if rank == self.rank else None, rank))
        return total

    # --- the work -----------------------------------------------------------------------------------------------------

    def dealt(self, costs: Sequence[float]) -> list[int]:
        """Which process does which job: the costliest first, each by whoever has least to do, the first one last."""
        load, owners = [0.0] * self.world, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            owners[job] = min(reversed(range(self.world)), key=load.__getitem__)
            load[owners[job]] += costs[job]
        return owners

    def joined(self, made: dict[str, Any]) -> dict[str, Any]:
        """What all processes have made, each under names of its own; in memory of the CPU where it is to be written."""
        everything: dict[str, Any] = {}
        for rank in range(self.world):
            everything |= self.spread(made, rank)
        return everything if self.alone or not self.first else _moved(everything, "cpu")

    # --- between processes --------------------------------------------------------------------------------------------

    def spread(self, value: Any, source: int) -> Any:
        """What process `source` has here, on every process, tensors on its device; all have to call it in one order."""
        if self.alone:
            return value
        mine = source == self.rank
        packed, tensors = _packed(value) if mine else (b"", [])
        head = [(packed, [(tensor.shape, tensor.dtype) for tensor in tensors])]
        with _together():
            dist.broadcast_object_list(head, src=source)
            packed, kinds = head[0]
            for place, (shape, dtype) in enumerate(kinds):
                if not mine:
                    tensors.append(torch.empty(shape, dtype=dtype, device=_device()))
                if shape.numel():
                    dist.broadcast(_raw(tensors[place]), src=source)
        return value if mine else _unpacked(packed, tensors)

    def agreed(self, value: Any) -> Any:
        """What the first process has here."""
        return self.spread(value, 0)

    def gathered(self, value: Any) -> list[Any]:
        """What every process has here, in order; for little things."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, value)
        return found


ALONE = Lanes()


# --- starting ---------------------------------------------------------------------------------------------------------


def launched() -> int:
    """How many processes this one was started with, by `torchrun` or as it would."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect(count: int, device: torch.device) -> Lanes:
    """This process among those it was started with, on a GPU of its own."""
    if launched() == 1:
        return Lanes(count)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Lanes(count, dist.get_rank(), dist.get_world_size())


def disconnect() -> None:
    """Part from the others, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check(recipe: Recipe, world: int) -> None:
    """Raise ValueError, in one sentence, for recipes some part of which wants the whole text in one process."""
    kv, learned = recipe.scheme.kv, isinstance(recipe.rotation, LearnedRotation)
    whole = [recipe.rotation.name] if learned and recipe.rotation is not None else []
    whole += [method.name for method in recipe.reconstruct]
    whole += ["a static range of keys and values"] if kv is not None and kv.static else []
    if whole and world > 1:
        raise ValueError(f"{whole[0]} wants the whole text on one GPU: drop --gpus")


# --- values on their way ----------------------------------------------------------------------------------------------


class _Packer(pickle.Pickler):
    """Leaves tensors out, and notes them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """Puts tensors where some were left out."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        return self._tensors[place]


def _packed(value: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return file.getvalue(), packer.tensors


def _unpacked(packed: bytes, tensors: Sequence[Tensor]) -> Any:
    return _Unpacker(io.BytesIO(packed), tensors).load()


def _moved(value: Any, device: str) -> Any:
    """The same value with every tensor in it on another device."""
    packed, tensors = _packed(value)
    return _unpacked(packed, [tensor.to(device) for tensor in tensors])


def _raw(tensor: Tensor) -> Tensor:
    """A tensor's bytes where processes exchange them: the tensor itself where it is there, in one piece."""
    return tensor.to(_device()).contiguous().reshape(-1).view(torch.uint8)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def _together() -> Iterator[None]:
    """Something that all processes do: it fails here where it, or anything before it, has failed elsewhere."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost(str(error)) from error
