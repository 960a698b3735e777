"""Times of work on a GPU: what every table of speeds is measured with, and the limits that it is held against.

One call is too short for a clock, so a recorded graph of many is timed, which takes its operands in turn from more
copies than any cache holds. What is compared takes turns too: clocks and temperatures change while one measures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

CACHE = 150e6
"""Bytes that are gone through before an operand is met again: three times the cache of an H100."""
Call = Callable[[], object]


def turns(size: int) -> int:
    """How many copies of an operand of so many bytes to go through."""
    return max(2, -(-int(CACHE) // size))


def recorded(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of 32 calls or more, made in turn, and how many they are."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), -(-32 // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for call in [*calls] * rounds:
            call()
    return graph, len(calls) * rounds


def microseconds(*rivals: Sequence[Call], repeats: int = 21) -> list[float]:
    """The median time of one call of each rival; they take turns, so that all meet the same clocks and temperatures."""
    graphs = [recorded(calls) for calls in rivals]
    times: list[list[float]] = [[] for _ in rivals]
    for repeat in range(repeats + 3):
        for (graph, count), into in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                into.append(1000 * begin.elapsed_time(end) / count)
    return [statistics.median(into) for into in times]


def limits() -> tuple[float, float]:
    """Bytes per microsecond that a copy reads and writes, and operations per microsecond of a large bf16 product."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)  # a kernel copies: in a graph, `copy_` is left to a slower engine
    bandwidth = 8 * source.numel() / microseconds([partial(torch.add, source, 1, out=target)])[0]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return bandwidth, 2 * 8192**3 / microseconds([lambda: a @ b])[0]
