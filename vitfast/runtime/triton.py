"""What Triton backends share: whether they can run, loading them late, types by name.

Triton is imported when a Triton backend is first asked, never by `import vitfast`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

from vitfast.runtime.dispatch import Backend
from vitfast.runtime.launches import Arch, arch_of, choice_of, has_run
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


def lazy(
    module: str,
    can_run: Callable[..., list[str]],
    *,
    key: Callable[..., dict[str, Any]] | None = None,
) -> Backend:
    """A Triton backend whose module, with `forward` and `backward`, is imported at its first call.

    Args:
        can_run: reasons against; must not need the module.
        key: for ops that a vendor's kernel may do faster: what that depends on, from the op's
            arguments. They are picked where the device's table says so for the nearest problem.
    """

    def call(function: str) -> Callable[..., Any]:
        return lambda *args: getattr(_imported(module), function)(*args)

    op = module.split(".")[-2]

    def unproven(first: Any, *args: Any) -> str:
        # A call's first argument is a tensor, or a tuple that begins with one.
        arch = arch_of((first if isinstance(first, torch.Tensor) else first[0]).device)
        chosen = key is None or choice_of(f"{op}.backend", arch, key(first, *args)) == "triton"
        if not has_run(op, arch):
            return f"no record shows it to have run on {arch.name}"
        return "" if chosen else f"{arch.name}'s table does not show it to be the fastest here"

    return Backend("triton", call("forward"), can_run, call("backward"), available, unproven)


_imported = functools.cache(importlib.import_module)


def guard(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype, arch: Arch) -> str:
    """`input_precision` of a tl.dot: TF32 where it exists and torch's own setting allows it."""
    # Unlike `allow_tf32`, this may be read whichever of torch's two settings was used.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and arch.has_tf32 and dtype == torch.float32 else "ieee"
