"""Memory that is free and still counted, on the host and on a GPU."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch


def release_memory() -> None:
    """Give freed pages back to the system, so that what comes next does not come on top.

    glibc keeps those of tensors below its threshold of 32 MB.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def gpu_room(device: torch.device, limit: int | None) -> int:
    """Bytes of a GPU that may still be taken: of those free, and of `limit`, all that this process is to take there."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for tensors to come
    free = torch.cuda.mem_get_info(device)[0] + kept
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
