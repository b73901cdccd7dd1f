"""Checks that several ops share. Messages name op and argument, what came and what was wanted."""

from __future__ import annotations

import math

import torch

from vitfast.errors import DeviceError, InputTypeError, InputValueError, UnsupportedInputError

_FLOAT8 = tuple(
    getattr(torch, n) for n in dir(torch) if n.startswith("float8_") or n.startswith("float4_")
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(op: str, name: str, t: object, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A dense tensor of one of these dtypes."""
    if not isinstance(t, torch.Tensor):
        raise InputTypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        kind = "nested" if t.is_nested else "quantised" if t.is_quantized else str(t.layout)
        raise UnsupportedInputError(f"{op}: {name} must be a dense tensor, got a {kind} one")
    if t.dtype in _FLOAT8:
        raise UnsupportedInputError(f"{op}: {name} has dtype {t.dtype}, which is not implemented")
    if t.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputTypeError(f"{op}: {name} has dtype {t.dtype}, expected one of {wanted}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    named = [(n, t) for n, t in tensors.items() if t is not None]
    for name, t in named[1:]:
        if t.device != named[0][1].device:
            raise DeviceError(
                f"{op}: {named[0][0]} is on {named[0][1].device}, but {name} is on {t.device}"
            )


def check_same_dtype(op: str, **tensors: torch.Tensor | None) -> None:
    named = [(n, t) for n, t in tensors.items() if t is not None]
    for name, t in named[1:]:
        if t.dtype != named[0][1].dtype:
            raise InputTypeError(
                f"{op}: {named[0][0]} has dtype {named[0][1].dtype}, but {name} has {t.dtype}"
            )


def check_shape(op: str, name: str, t: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and tuple(t.shape) != shape:
        raise InputValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")


def check_eps(op: str, eps: float) -> None:
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):  # as a compiler can trace it
        raise InputValueError(f"{op}: eps must be a positive number, got {eps!r}")
