"""Finding the compiled extension `vitfast._native`, or saying why there is none.

The extension knows no torch: it takes addresses, sizes and strides. `torch` is imported first, so
that the extension resolves its OpenMP library to the copy that torch already loaded.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from vitfast.errors import BackendUnavailableError
from vitfast.runtime import memory
from vitfast.runtime.storages import Storages
from vitfast.settings import ISA_LEVELS, settings

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
"""The numbers of `DType` in csrc/common/dtype.h."""
LARGE = 4 << 20
"""Bytes from which a result asks for huge pages and its storage is used again."""
RESULTS = Storages(min(memory.available() // 32, 512 << 20))
_READABLE = frozenset(
    (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
)
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


def extension() -> ModuleType | None:
    """The extension, whatever the settings say; None where there is none."""
    return _load()[0]


def reasons() -> list[str]:
    """Why native kernels cannot run; empty when they can."""
    module, why = _load()
    if settings.disable:
        return ["VITFAST_DISABLE is set"]
    return [] if module is not None else [why]


_applied_isa: str | None = None
recorder: ContextVar[Any] = ContextVar("recorder", default=None)
"""What stands for the extension where `engine.replay` records: on one thread, for one function."""


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
    return recorder.get() or module


def isa() -> str:
    """Name of the instruction set in use."""
    return ISA_LEVELS[native().selected_isa()]


def threads() -> int:
    return torch.get_num_threads()


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """torch.empty, of the CPU by default; a large result lies in memory that is used again once
    nobody else has its storage, unless `settings.memory` is "low"."""
    device = device or _CPU
    nbytes = math.prod(shape) * dtype.itemsize
    may_keep = device == _CPU and recorder.get() is None and settings.memory != "low"
    if nbytes < LARGE or not may_keep:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = RESULTS.take(nbytes)
    if storage is not None:
        return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)  # type: ignore[call-overload]
    try:
        out = torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:  # no memory; some may be kept here
        RESULTS.clear()
        out = torch.empty(shape, dtype=dtype, device=device)
    module = extension()
    if module is not None:
        module.ask_for_huge_pages(out.data_ptr(), nbytes)
    if out.untyped_storage().nbytes() == nbytes:  # torch.empty's own, that is
        RESULTS.keep(out.untyped_storage())
    return out


def _address(t: torch.Tensor | None) -> Any:
    """Where a tensor's elements begin, for an argument of the extension; 0 for None.

    Returns:
        An object with `__index__`. It keeps the tensor's storage: while a kernel runs without the
        GIL, another thread may assign to the tensor's `data`.
    """
    return native().address(t)


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


# At once: it is called for every argument.
address = getattr(extension(), "address", _address)
Address = getattr(extension(), "Address", int)
"""What `address` gives for a tensor."""
