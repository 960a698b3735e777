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
    seen = Observed(samples={path: [] for path in inspect})
    tallies: list[Tally] = []
    originals: dict[str, Tensor] = {}
    current, compared = 0, False
    with ExitStack() as stack:

        def on_input(tap: Tap, tally: Tally, last: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = module.mapped(args[0]) if isinstance(module, QLinear) else args[0]
                x = x.reshape(-1, x.shape[-1])
                if not compared:
                    tally.update(x, originals.pop(tap.name, None))
                elif tap.sites[0].expert is None:
                    originals[tap.name] = x
                if last and (compared or (current not in recorded and current not in outputs)):
                    raise _Seen

            return hook

        def on_call(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if current in recorded and not compared:
                    seen.samples[path].append(Sample(args, kwargs, first(output)))

            return hook

        if needs:
            for index, tap in enumerate(taps):
                tallies.append(lanes.tally(needs))
                last = index == len(taps) - 1 and tap.sites[0].expert is None
                module = block.get_submodule(tap.name)
                stack.callback(module.register_forward_pre_hook(on_input(tap, tallies[-1], last)).remove)
        for path in inspect:
            module = block.get_submodule(path)
            stack.callback(module.register_forward_hook(on_call(path), with_kwargs=True).remove)
        for current in range(batches) if needs or recorded else sorted(outputs):
            if current in lanes.turns:
                for tally in tallies:
                    tally.turn()
            if original is not None:
                compared = True
                with suppress(_Seen):
                    original(block, current)
                compared = False
            try:
                output = forward(block, current)
            except _Seen:
                continue
            if current in outputs:
                seen.outputs[current] = output
    for tap, tally in zip(taps, tallies, strict=False):
        stats = lanes.total(tally)
        seen.stats.update({site.name: stats for site in tap.sites})
    return seen
