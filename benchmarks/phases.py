"""Where a block's time goes: seconds of each phase of quantizing, measured from outside.

Functions of the package are wrapped while a run lasts. A phase's time is its own, without that of the phases within it,
and the GPU is waited for at both ends: the sum is more than a run takes by itself, where Python runs ahead of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from lowbit.methods import gptq, stacked, views
from lowbit.methods.awq import AWQ, AWQClip
from lowbit.numerics.stats import Gram
from lowbit.stream import block, rounding, sweep
from lowbit.stream.edge_stack import ExpertEdges
from lowbit.stream.edges import BlockEdge
from lowbit.stream.prologue import Calls

PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "read": ((sweep.Sweep, "_tensors"), (sweep, "check_finite")),
    "forward": ((Calls, "run"),),
    "Gram": ((Gram, "update"),),
    "AWQ's scales": ((AWQ, "fold"), (AWQ, "fold_stack")),
    "AWQ's candidates": ((BlockEdge, "error"), (ExpertEdges, "errors")),
    "factor": ((views, "inverse_factor"), (views, "inverse_factors")),
    "clip": ((AWQClip, "fit"), (AWQClip, "fit_stack")),
    "sweep": ((gptq, "sweep"), (stacked, "sweep")),
    "round, the rest": ((block, "rounded"),),
    "codes to the CPU": ((rounding, "_parted"),),
    "install": ((block, "install"), (sweep, "install")),
    "plain rounding": ((block, "_plain_error"),),
    "wait for writing": ((sweep._Writer, "start"), (sweep._Writer, "_wait")),
    "free": ((sweep, "free"), (sweep, "release_memory"), (sweep.gc, "collect")),
    "all else of a block": ((sweep.Sweep, "_quantize"),),
}


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs meanwhile; to be read when it has ended."""
    seconds: dict[str, float] = defaultdict(float)
    within: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            began = time.perf_counter()
            within.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                spent = time.perf_counter() - began
                seconds[name] += spent - within.pop()
                if within:
                    within[-1] += spent

        return call

    patches = [
        patch.object(owner, place, timed(name, getattr(owner, place)))
        for name, places in PHASES.items()
        for owner, place in places
    ]
    for each in patches:
        each.start()
    try:
        yield seconds
    finally:
        for each in patches:
            each.stop()
