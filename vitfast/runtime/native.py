"""Finding the compiled extension `vitfast._native`, or saying why there is none.

The extension knows no torch: it takes addresses, sizes and strides. `torch` is imported first, so
that the extension resolves its OpenMP library to the copy that torch already loaded.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from vitfast.errors import BackendUnavailableError
from vitfast.settings import ISA_LEVELS, settings

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""The numbers of `DType` in csrc/common/dtype.h."""
_LARGE = 4 << 20
"""Bytes from which a result lies in pages of its own, see csrc/common/pages.h."""
_DLPACK = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
}
"""DLPack's code and bits of a dtype."""
_READABLE = frozenset(
    (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
)
_MOST_KEPT = 512 << 20
_CPU = torch.device("cpu")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("vitfast._native")
    except ImportError as error:
        try:
            from vitfast._build_info import NATIVE_STATUS  # written by setup.py
        except ImportError:
            NATIVE_STATUS = "vitfast is used from a source tree that was not built"
        if NATIVE_STATUS == "built":
            return None, f"native extension failed to load: {error}"
        return None, f"native extension not built: {NATIVE_STATUS}"
    return module, ""


def reasons() -> list[str]:
    """Why native kernels cannot run; empty when they can."""
    module, why = _load()
    if settings.disable:
        return ["VITFAST_DISABLE is set"]
    return [] if module is not None else [why]


_applied_isa: str | None = None
recorder: Any = None
"""What stands for the extension while `runtime.tape` records."""


def native() -> ModuleType:
    """The extension, set to the instruction set that `settings.cpu_isa` allows.

    Raises:
        BackendUnavailableError: the extension is missing, or the CPU lacks the set asked for.
    """
    global _applied_isa
    module, why = _load()
    if module is None:
        raise BackendUnavailableError(why)
    if settings.cpu_isa != _applied_isa:
        wanted = settings.cpu_isa or ISA_LEVELS[module.best_isa()]
        if ISA_LEVELS.index(wanted) > module.best_isa():
            raise BackendUnavailableError(
                f"cpu_isa={wanted!r} asked for, but this CPU and build offer at most "
                f"{ISA_LEVELS[module.best_isa()]!r}; VITFAST_CPU_ISA can only lower it"
            )
        module.select_isa(ISA_LEVELS.index(wanted))
        _applied_isa = settings.cpu_isa
    return module if recorder is None else recorder


def isa() -> str:
    """Name of the instruction set in use."""
    return ISA_LEVELS[native().selected_isa()]


def threads() -> int:
    return torch.get_num_threads()


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """torch.empty; a large tensor of the CPU in memory that is kept for the next one.

    Its storage cannot be resized.
    """
    device = device or _CPU
    if (
        recorder is None
        and dtype in _DLPACK
        and math.prod(shape) * dtype.itemsize >= _LARGE
        and device == _CPU
    ):
        module = _with_pages()
        pages = None if module is None else module.pages_tensor(shape, *_DLPACK[dtype])
        if pages is not None:
            return from_dlpack(pages)
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _with_pages() -> ModuleType | None:
    """The extension, told how much memory it may keep."""
    module, _ = _load()
    if module is not None:
        module.limit_pages(min(memory() // 32, _MOST_KEPT))
    return module


def memory() -> int:
    """Bytes of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 << 30


def is_readable(t: torch.Tensor) -> bool:
    """Whether a tensor's elements are what lies at its address, one stride from the next.

    Not so of negated views (`torch._neg_view`, the imaginary part of a lazy conjugate), which hold
    the opposite; of zero tensors without memory (`torch._efficientzerotensor`); and of complex,
    sparse, nested, quantised and oneDNN's tensors. Before a registered op runs torch's dispatcher
    writes out the first two, and `checks.check_tensor` refuses the others.
    """
    if t.dtype not in _READABLE or t.is_nested or t.is_neg():
        return False
    try:
        return t.data_ptr() != 0 or t.numel() == 0 or t.is_meta
    except RuntimeError:
        return False


def address(t: torch.Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for one that is absent or has none."""
    return 0 if t is None or t.numel() == 0 else t.data_ptr()
