"""Peak memory of a call: resident pages on CPUs (Linux), torch's allocator on CUDA.

Python's tracemalloc does not see tensors, and `ru_maxrss` never falls. Linux can reset the
high-water mark of a process; where it cannot be reset the answer is None, not a guess.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def resident_mb(field: str = "VmRSS") -> float | None:
    """Resident memory now ("VmRSS") or its high-water mark ("VmHWM") in MB (10^6 bytes)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def reset_peak(device: str = "cpu") -> bool:
    """Set the high-water mark to what is in use now, after garbage is gone; False if impossible."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    _trim_heap()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def in_use_mb(device: str = "cpu") -> float | None:
    """MB in use now; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 1e6
    return resident_mb()


def peak_mb(device: str = "cpu") -> float | None:
    """The high-water mark in MB since `reset_peak`; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resident_mb("VmHWM")


def added_by(call: Callable[[], Any], device: str = "cpu") -> float | None:
    """MB that a call needs at its peak beyond what was in use before it, outputs included.

    None where the high-water mark cannot be reset.
    """
    if not reset_peak(device):
        return None
    before = in_use_mb(device)
    output = call()
    peak = peak_mb(device)
    del output
    return None if before is None or peak is None else max(0.0, peak - before)


def _trim_heap() -> None:
    """Give freed pages back to the system, so that they count again when they are used again."""
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
