"""Memory that is free and still counted, on the host and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def settled() -> Iterator[None]:
    """What exists now is left out by the collector of garbage until the end."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory() -> None:
    """Give freed pages back to the system, so that what comes next does not come on top.

    glibc keeps those of tensors below its threshold of 32 MB.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def gpu_size(device: torch.device, limit: int | None) -> int:
    """Bytes of a GPU in all, or as many as `limit` lets this process take there; the same on every GPU of a kind."""
    size = torch.cuda.get_device_properties(device).total_memory
    return size if limit is None else min(size, limit)


def in_parts(items: Sequence[T], each: int, limit: int, least: int = 1) -> list[Sequence[T]]:
    """Items of `each` bytes in parts of about one length that take `limit` bytes at most, or are one item.

    There are `least` parts or more, as far as there are items.
    """
    count = max(-(-len(items) // max(1, limit // each)), min(least, len(items)))
    ends = [len(items) * part // count for part in range(count + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


def at_home(states: int, room: int) -> bool:
    """Whether hidden states of so many bytes live on a GPU where `room` may be had: in less than two fifths of it."""
    return 5 * states < 2 * room


def gpu_room(device: torch.device, limit: int | None) -> int:
    """Bytes of a GPU that may still be taken: of those free, and of `limit`, all that this process is to take there."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for tensors to come
    free = torch.cuda.mem_get_info(device)[0] + kept
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))


def free_memory() -> int:
    """Bytes of the host's memory that nobody uses now."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
