"""True-sequential rounding for the price of one forward pass: a block runs stage by stage.

A stage is what is rounded on one look at its inputs: a tap, or one projection of all experts. In every pass each
micro-batch runs up to the inputs of the stage and no further; these are complete then, the stage is rounded, and the
next pass goes on through it. A pass starts at the top of the block, since a forward cannot be paused without threads,
but what is complete is not computed again: modules whose linears are all rounded hand out what they returned before,
norms that only such modules read return nothing of use, and little more than additions is repeated.

Most attention and feed-forward modules return what their last linear returns. Then that linear's input, seen anyhow, is
all that is kept of the module, and attention itself runs once. What exceeds the budget is computed again: slower, and
the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.anatomy import Edge, Norm, Site, Tap
from ..methods.views import Need, Stats
from ..modules.linear import QLinear
from .edges import first
from .lanes import ALONE, Lanes, Tally
from .observe import Forward

Stage = tuple[Tap, ...]


def stages(taps: Sequence[Tap]) -> list[Stage]:
    """Taps in the order in which they are rounded; experts of one projection are one stage."""
    grouped: dict[str, list[Tap]] = {}
    for tap in taps:
        site = tap.sites[0]
        key = site.name if site.expert is None else site.name.replace(f".{site.expert}.", ".*.")
        grouped.setdefault(key, []).append(tap)
    return [tuple(group) for group in grouped.values()]


@dataclass(frozen=True)
class Tail:
    """A module that returns the very output of one of its linears, alone or with `others` (no tensors) behind it."""

    module: str
    linear: str
    others: tuple[Any, ...] | None

    def output(self, y: Tensor) -> Any:
        """What the module returns where its linear returns `y`."""
        return y if self.others is None else (y, *self.others)


@dataclass
class Layout:
    """How a block's modules are called and what they return, seen while it runs once."""

    calls: Counter[str] = field(default_factory=Counter)
    """By path of a module within the block."""
    tails: dict[str, Tail] = field(default_factory=dict)
    """By linear, its largest such module within the block."""

    @contextmanager
    def watching(self, block: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
        """Take notes of one forward of `block`."""
        above = _above(sites)
        made: dict[str, Tensor] = {}

        def note(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.calls[path] += 1
                y = first(output)
                if path in names:
                    made[path] = y
                if path in names or path not in above:
                    return
                others = output[1:] if isinstance(output, tuple) else None
                if _tensors(others) == []:
                    linears = [name for name in above[path] if made.get(name) is y]
                    self.tails.update({name: Tail(path, name, others) for name in linears})

            return hook

        names = {site.name for site in sites}
        with ExitStack() as stack:
            for path, module in block.named_modules():
                if path:
                    stack.callback(module.register_forward_hook(note(path)).remove)
            yield


def _above(sites: Sequence[Site]) -> dict[str, list[str]]:
    """Path of every module within the block that is a site or holds some -> those sites' names."""
    found: dict[str, list[str]] = {}
    for site in sites:
        parts = site.name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), []).append(site.name)
    return found


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors in what a module returned; None where it may hold some that are not seen."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    if type(value) is not tuple:
        return None
    parts = [_tensors(part) for part in value]
    return None if None in parts else [tensor for part in parts if part is not None for tensor in part]


class _Paused(Exception):
    """This micro-batch has come to the inputs of the stage."""


@dataclass
class _Kept:
    """What is kept of a module for one micro-batch: what it returned, or the input of its last linear."""

    value: Any
    tail: Tail | None
    tensors: list[Tensor]
    versions: list[int]

    @property
    def intact(self) -> bool:
        """False where the model has since written into it: some add in place to what a module returned."""
        return all(t._version == v for t, v in zip(self.tensors, self.versions, strict=True))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)


class Passes:
    """The passes of one block: `observe(0)`, round and install stage 0, `observe(1)`, …, and at last `outputs()`.

    `sites` that are in no stage compute from the start what they will; `edges` say who alone reads a norm. Between the
    passes modules may be replaced; all is remembered by path. At most `budget` bytes are kept. The `batches` are those
    of this process among the `lanes`.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        edges: Sequence[Edge],
        stages: Sequence[Stage],
        layout: Layout,
        forward: Forward,
        batches: int,
        budget: int,
        lanes: Lanes = ALONE,
    ) -> None:
        self.stages, self._lanes = stages, lanes
        self._block, self._forward, self._batches, self._budget = block, forward, batches, budget
        self._sites = {site.name: site for site in sites}
        stage_of = {site.name: index for index, stage in enumerate(stages) for tap in stage for site in tap.sites}
        above = _above(sites)
        self._last = {path: max(stage_of.get(name, -1) for name in names) for path, names in above.items()}
        self._beneath = {path: [p for p in above if p.startswith(f"{path}.")] for path in above}
        self._once = {path for path in above if layout.calls[path] == 1}
        self._tails = {
            name: tail
            for name, tail in layout.tails.items()
            if self._last[tail.module] == stage_of.get(name) and {tail.module, name} <= self._once
        }
        self._readers = {
            edge.source.name: (*(site.name for site in edge.readers), *edge.others)
            for edge in edges
            if isinstance(edge.source, Norm) and layout.calls[edge.source.name] == 1
        }
        self._kept: list[dict[str, _Kept]] = [{} for _ in range(batches)]
        self._bytes = 0
        self._stage = self._batch = 0
        self._heads: dict[str, Tally] = {}
        self._astray = False

    @torch.no_grad()
    def observe(self, stage: int, needs: frozenset[Need]) -> dict[str, Stats]:
        """Statistics of the stage's inputs by site, shared within a tap; all stages before it are installed."""
        self._heads = {tap.name: self._lanes.tally(needs) for tap in self.stages[stage]}
        for _ in self._pass(stage):
            pass
        stats = {name: self._lanes.total(tally) for name, tally in self._heads.items()}
        return {site.name: stats[tap.name] for tap in self.stages[stage] for site in tap.sites}

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """The block's output for every micro-batch in turn, all stages being installed; then nothing is kept."""
        self._heads = {}
        for output in self._pass(len(self.stages)):
            assert output is not None, "nothing is left to pause at"
            yield output

    def _pass(self, stage: int) -> Iterator[Tensor | None]:
        """Run every micro-batch, and give its output, or None where it paused."""
        self._stage = stage
        with ExitStack() as stack:
            calls = {path: self._call for path in self._last} | {path: self._normalize for path in self._readers}
            for path, call in calls.items():
                module = self._block.get_submodule(path)
                vars(module)["forward"] = partial(call, path, module.forward)
                stack.callback(vars(module).pop, "forward")
            for batch in range(self._batches):
                self._batch, self._astray = batch, False
                if batch in self._lanes.turns:
                    for tally in self._heads.values():
                        tally.turn()
                try:
                    output = self._forward(self._block, batch)
                except _Paused:
                    yield None
                else:
                    yield output

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward of a linear, or of a module that holds some."""
        if self._last[path] < self._stage:
            return self._complete(path, forward, args, kwargs)
        site = self._sites.get(path)
        if site is None:
            return forward(*args, **kwargs)
        x: Tensor = args[0]
        if path in self._heads:
            module = self._block.get_submodule(path)
            seen = module.mapped(x) if isinstance(module, QLinear) else x
            self._heads[path].update(seen.reshape(-1, seen.shape[-1]))
            if path in self._tails:
                self._keep(self._tails[path].module, x, self._tails[path])
            if site.expert is None:
                raise _Paused
        # Other experts are still to be seen. Nothing that they see follows from this one's output, so any will do.
        self._astray = True
        return x.new_zeros(*x.shape[:-1], site.shape[0])

    def _normalize(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward of a norm: what its readers pause at in one pass is kept for the next."""
        here = self._kept[self._batch]
        kept = here.get(path)
        self._drop(path)
        if all(self._answers(reader) for reader in self._readers[path]):
            return args[0]  # nobody looks at it
        if kept is not None and kept.intact:
            return kept.value
        output = forward(*args, **kwargs)
        if any(self._last.get(reader) == self._stage for reader in self._readers[path]):
            self._keep(path, output, None)
        return output

    def _answers(self, path: str) -> bool:
        """Whether a module hands out what is kept of it, or of one that it is part of, whatever it is called with."""
        parts = path.split(".")
        found = (self._kept[self._batch].get(".".join(parts[:end])) for end in range(1, len(parts) + 1))
        return any(kept is not None and kept.intact for kept in found)

    def _complete(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module returns whose linears are all as they will be."""
        kept = self._kept[self._batch].get(path)
        final = self._stage == len(self.stages)
        if final:
            self._drop(path)
        if kept is not None and kept.intact:
            if kept.tail is None:
                return kept.value
            output = kept.tail.output(self._block.get_submodule(kept.tail.linear)(kept.value))
        else:
            output = forward(*args, **kwargs)
        if not final and not self._astray and path in self._once:
            self._keep(path, output, None)
        return output

    def _keep(self, path: str, value: Any, tail: Tail | None) -> None:
        """Keep it for the passes to come, in place of all that is kept of the modules within."""
        tensors = _tensors(value)
        if tensors is None:
            return
        here = self._kept[self._batch]
        kept = _Kept(value, tail, tensors, [tensor._version for tensor in tensors])
        replaced = [p for p in (path, *self._beneath.get(path, ())) if p in here]
        if self._bytes - sum(here[p].nbytes for p in replaced) + kept.nbytes > self._budget:
            return
        for other in replaced:
            self._drop(other)
        here[path] = kept
        self._bytes += kept.nbytes

    def _drop(self, path: str) -> None:
        kept = self._kept[self._batch].pop(path, None)
        self._bytes -= 0 if kept is None else kept.nbytes
