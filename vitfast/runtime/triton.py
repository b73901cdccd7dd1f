"""What Triton backends share: whether they can run, what fails at a launch, types by name.

Triton is imported when a Triton backend is first asked, never by `import vitfast`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from typing import Any

import torch

from vitfast.runtime.launches import Arch, arch_of
from vitfast.settings import settings

NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
"""Triton's names of dtypes, as in the signature of a kernel ("*fp16")."""
COUNTS = (
    "rows", "n", "tokens", "prefix", "batch", "heads", "queries", "keys", "per_image", "columns",
    "map_height", "map_width",
    "windows", "per", "high", "wide", "shift_y", "shift_x", "table_p", "table_h",
)  # fmt: skip
"""Arguments of kernels that change from call to call: one compiled kernel serves them all."""


@functools.cache
def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was loaded: kernels then run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return "" if version >= (3, 6) else f"triton {triton.__version__} is too old: 3.6 is needed"


def available() -> list[str]:
    """Why Triton kernels could never run in this process; empty when they can."""
    if settings.disable:
        return ["VITFAST_DISABLE is set"]
    if _missing():
        return [_missing()]
    if torch.cuda.is_available() or ("triton" in sys.modules and interpreting()):
        return []
    return ["there is no GPU"]


def reasons(*tensors: torch.Tensor | None, dots: bool = False) -> list[str]:
    """Why a Triton kernel cannot take these tensors; empty when it can.

    Args:
        dots: whether the kernel lives on matrix products.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if device.type != "cuda" and (device.type != "cpu" or _missing() or not interpreting()):
        return [_missing() or f"tensors are on {device}, not on a GPU"]
    why = available()
    if device.type == "cpu":
        if any(t.dtype == torch.bfloat16 for t in given):
            why.append("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")
        return why
    if any(t.dtype == torch.float64 for t in given):
        why.append("float64 is not implemented on GPUs")
    arch = arch_of(device)
    if dots and not arch.has_dot:
        why.append(f"Triton has no matrix instructions on {arch.name}")
    return why


_IN_A_KERNEL = ("illegal", "misaligned", "unspecified", "assert", "uncorrectable", "stack error")
"""What a driver's error has in its name where a kernel ran and broke the process's GPU context."""


def is_launch_failure(error: BaseException) -> bool:
    """Whether a call raised this because a kernel could not be compiled, loaded or launched.

    Nothing was written then. An illegal access is no such failure: it has spoilt the process's
    whole GPU context, and is for the user to see; nor is want of memory for a result.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    if type(error).__module__.split(".")[0] == "triton":
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or any(word in text for word in _IN_A_KERNEL):
        return False
    return "Triton Error [" in text or "PassManager::run failed" in text


def guard(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype, arch: Arch) -> str:
    """`input_precision` of a tl.dot: TF32 where it exists and torch's own setting allows it."""
    # Unlike `allow_tf32`, this may be read whichever of torch's two settings was used.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and arch.has_tf32 and dtype == torch.float32 else "ieee"
