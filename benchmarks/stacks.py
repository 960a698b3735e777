"""A mixture's experts on one GPU, so many at a time: milliseconds an expert, and memory against what the plan counts.

    python benchmarks/stacks.py [--shapes mixtral-down deepseek-gate-up]

Weights and inputs are random. `by panels` and `singly` are the two ways in which a stack's Gram matrices are factorized
(`numerics/feedback.py` changes over at `_WIDE` columns), `clip` and `scales` AWQ's two searches, `round` is GPTQ with
that clip as a run calls it. A part of one is what experts are that do not fit a stack.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from lowbit.methods.awq import AWQ, AWQClip
from lowbit.methods.gptq import GPTQ
from lowbit.methods.views import Stats
from lowbit.numerics import feedback
from lowbit.numerics.feedback import inverse_factors
from lowbit.numerics.spec import Int, Spec, per_group
from lowbit.stream.rounding import entry_bytes

SHAPES = {
    "mixtral-gate-up": (8, 28672, 4096),
    "mixtral-down": (8, 4096, 14336),
    "deepseek-gate-up": (64, 2816, 2048),
    "deepseek-down": (64, 2048, 1408),
}
"""Experts, output rows, input columns."""
SPEC = per_group(Int(4), 128)


@dataclass
class Edges:
    """An `EdgeStack` of these experts."""

    weights: Tensor
    stats: list[Stats]
    spec: Spec = SPEC

    @property
    def absmean(self) -> Tensor:
        """[E, I]."""
        return torch.stack([seen.absmean.mean for seen in self.stats if seen.absmean is not None])

    def __post_init__(self) -> None:
        self._hessians = torch.stack([seen.hessian() for seen in self.stats])

    def errors(self, weights: Tensor) -> Tensor:
        """[E]."""
        difference = weights - self.weights
        return ((difference @ self._hessians) * difference).flatten(1).sum(1)


def main() -> None:
    """Print a table for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name in arguments.shapes:
        count, rows, columns = SHAPES[name]
        print(f"| {name} | by panels | singly | clip | scales | round | peak, GiB | counted |")
        print("|---|---|---|---|---|---|---|---|")
        stats = [seen(columns) for _ in range(count)]
        weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for size in (1, 2, 4, 8, 16, 64):
            if size <= count and size * entry_bytes((rows, columns)) < 24 << 30:
                print(f"| {size} | " + " | ".join(measured(weights[:size], stats[:size])) + " |", flush=True)
        del stats, weights
        torch.cuda.empty_cache()


def seen(columns: int) -> Stats:
    """Statistics of 2 · 4096 random tokens, columns of different sizes."""
    stats, sizes = Stats.observing(frozenset({"gram", "absmean"})), torch.rand(columns, device="cuda") + 0.05
    for _ in range(2):
        stats.update((torch.randn(4096, columns, device="cuda") * sizes).bfloat16())
    stats.hessian()
    return stats


def measured(weights: list[Tensor], stats: list[Stats]) -> list[str]:
    """The cells of a row."""
    cells = [*factorized(stats), *searched([weight.float() for weight in weights], stats)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cells.append(milliseconds(lambda: rounded(weights, stats)))
    peak = torch.cuda.max_memory_allocated() - before
    counted = len(weights) * entry_bytes((weights[0].shape[0], weights[0].shape[1]))
    return [*(f"{cell / len(weights):.2f}" for cell in cells), f"{peak / 2**30:.2f}", f"{counted / 2**30:.2f}"]


def factorized(stats: list[Stats]) -> Iterator[float]:
    """All Gram matrices by panels, and one by one."""
    hessians, orders = [each.hessian() for each in stats], [each.order(True)[0] for each in stats]
    for wide in (1 << 30, 0):
        with patch.object(feedback, "_WIDE", wide):
            yield milliseconds(lambda: inverse_factors(hessians, 0.01, orders))


def searched(weights: list[Tensor], stats: list[Stats]) -> Iterator[float]:
    """Ranges, and scales."""
    yield milliseconds(lambda: AWQClip().fit_stack(weights, SPEC, stats, scores=False))
    edges = Edges(torch.stack(weights), stats)
    yield milliseconds(lambda: AWQ().fold_stack(edges))


def rounded(weights: list[Tensor], stats: list[Stats]) -> None:
    """As `stream/rounding.py` does."""
    for each in stats:
        each._factors.clear()
    if len(weights) == 1:
        GPTQ().round(weights[0].float(), SPEC, AWQClip(), stats[0], scores=False)
    else:
        GPTQ().round_stack([weight.float() for weight in weights], SPEC, AWQClip(), stats, scores=False)


def milliseconds(function: Callable[[], object]) -> float:
    """Median of three, behind a first call."""
    times = []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
