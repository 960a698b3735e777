"""One pass over a block that collects what the recipe asked for: statistics per tap, calls of inspected modules.

Linears behind one input share one set of statistics. The pass ends as soon as the last tap has been seen, except for
the micro-batches whose output somebody needs. Experts see only the tokens routed to them, and since the original
model may route them elsewhere, its inputs are compared with theirs nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.anatomy import Tap
from ..methods.views import Need, Stats
from ..modules.linear import QLinear
from .edges import Sample, first
from .lanes import ALONE, Lanes, Tally

Forward = Callable[[nn.Module, int], Tensor]
"""(block, micro-batch) -> the block's output hidden states [b, T, D]."""


@dataclass
class Observed:
    """Statistics by site (shared objects within a tap), recorded calls by module path, outputs by micro-batch."""

    stats: dict[str, Stats] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class _Seen(Exception):
    """The last tap of this micro-batch has been observed: nothing further is needed."""


@dataclass
class _Watch:
    """What the hooks of one pass know: which micro-batch runs, on which model, and what was seen so far."""

    recorded: frozenset[int]
    outputs: frozenset[int]
    seen: Observed
    current: int = 0
    compared: bool = False
    """Whether the original model runs, whose inputs are compared with those to come."""
    originals: dict[str, Tensor] = field(default_factory=dict)

    def on_input(self, tap: Tap, tally: Tally, last: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook that counts a tap's inputs, and ends the pass behind the `last` one where nobody needs more."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = module.mapped(args[0]) if isinstance(module, QLinear) else args[0]
            x = x.reshape(-1, x.shape[-1])
            if not self.compared:
                tally.update(x, self.originals.pop(tap.name, None))
            elif tap.sites[0].expert is None:
                self.originals[tap.name] = x
            if last and (self.compared or self.current not in self.recorded | self.outputs):
                raise _Seen

        return hook

    def on_call(self, path: str) -> Callable[..., None]:
        """A hook that keeps an inspected module's calls for the recorded micro-batches."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.current in self.recorded and not self.compared:
                self.seen.samples[path].append(Sample(args, kwargs, first(output)))

        return hook


@torch.no_grad()
def observe(
    block: nn.Module,
    taps: Sequence[Tap],
    needs: frozenset[Need],
    forward: Forward,
    batches: int,
    *,
    inspect: Collection[str] = (),
    recorded: Collection[int] = (),
    outputs: Collection[int] = (),
    original: Forward | None = None,
    lanes: Lanes = ALONE,
) -> Observed:
    """Run all micro-batches through `block` and observe.

    `inspect` are the modules whose calls are kept for the micro-batches in `recorded`; `outputs` are the micro-batches
    whose final hidden states are kept. `original` is `forward` on the original model's stream, for statistics of both.
    With `lanes` the micro-batches are those of this process, and the statistics those of the whole text.
    """
    watch = _Watch(frozenset(recorded), frozenset(outputs), Observed(samples={path: [] for path in inspect}))
    tallies = [lanes.tally(needs) for _ in taps] if needs else []
    with ExitStack() as stack:
        for index, (tap, tally) in enumerate(zip(taps, tallies, strict=False)):
            last = index == len(taps) - 1 and tap.sites[0].expert is None
            module = block.get_submodule(tap.name)
            stack.callback(module.register_forward_pre_hook(watch.on_input(tap, tally, last)).remove)
        for path in inspect:
            module = block.get_submodule(path)
            stack.callback(module.register_forward_hook(watch.on_call(path), with_kwargs=True).remove)
        for current in range(batches) if needs or recorded else sorted(outputs):
            if current in lanes.turns:
                for tally in tallies:
                    tally.turn()
            watch.current = current
            if original is not None:
                watch.compared = True
                with suppress(_Seen):
                    original(block, current)
                watch.compared = False
            with suppress(_Seen):
                output = forward(block, current)
                if current in outputs:
                    watch.seen.outputs[current] = output
    for tap, tally in zip(taps, tallies, strict=False):
        stats = lanes.total(tally)
        watch.seen.stats.update({site.name: stats for site in tap.sites})
    return watch.seen
