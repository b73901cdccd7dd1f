"""Whether the automatic choice has a fused kernel for an op's calls on a device, in a dtype.

Where it has none, an op runs its reference, which is no faster than timm and may do more work: a
swapped layer asks here first, and leaves the call to timm's forward. An op that is called directly
runs its reference all the same, and a backend that is asked for by name always runs.
"""

from __future__ import annotations

import torch

from vitfast.runtime import native, triton
from vitfast.runtime.launches import arch_of, from_tables, has_run
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""That the kernels of the C++ extension, and Triton's, take."""


def untrusted(ops: tuple[str, ...], x: torch.Tensor) -> str:
    """Why layers leave a call to timm's forward rather than to these ops; "" where they do not.

    Args:
        ops: names of `vitfast.ops`; without any there is nothing to distrust.
        x: the call's input; its device, its dtype and that of autocast are what counts.
    """
    if not ops or settings.backend != "auto":
        return ""
    return _reason(ops, x.device, x.dtype, autocast_dtype(x.device))


@torch.compiler.assume_constant_result
def _reason(ops: tuple[str, ...], device: torch.device, *dtypes: torch.dtype | None) -> str:
    missing = tuple(native.reasons()) if device.type == "cpu" else ()
    return _untrusted(ops, device, *dtypes, missing)


@from_tables
def _untrusted(
    ops: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    missing: tuple[str, ...],
) -> str:
    known = _DTYPES.get(device.type)
    if known is None:
        return f"there are no kernels for {device.type}"
    for given in (dtype, autocast or dtype):
        if given not in known:
            name = "the CPU" if device.type == "cpu" else "GPUs"
            return f"there are no kernels for {given} on {name}"
    if device.type == "cpu":
        return "; ".join(missing)
    why = triton.available()
    if why:
        return "; ".join(why)
    arch = arch_of(device)
    unseen = [op for op in ops if not has_run(op, arch)]
    return f"no record shows {', '.join(unseen)} to be right on {arch.name}" if unseen else ""
