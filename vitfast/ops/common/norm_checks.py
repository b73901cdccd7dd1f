"""Checks of arguments, and autocast's dtypes, that the norms and residual connections share."""

from __future__ import annotations

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.ops.common.norm import KINDS
from vitfast.runtime import checks
from vitfast.runtime.library import autocast_dtype


def check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    channels: int | None = None,
) -> None:
    """What holds for every norm over the last dimension of x; op is named in the errors.

    Args:
        weight, bias: [channels] each; channels is the size of x's last dimension by default.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
    """
    checks.check_tensor(op, "x", x)
    if x.ndim == 0:
        raise InputValueError(f"{op}: x must have at least one dimension, got a scalar")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.check_tensor(op, name, t)
            checks.check_shape(op, name, t, (x.shape[-1] if channels is None else channels,))
    checks.check_same_device(op, x=x, weight=weight, bias=bias)
    checks.check_eps(op, eps)
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise InputTypeError(f"{op}: out_dtype must be a floating dtype, got {out_dtype}")


def check_kind(
    op: str, norm: object, bias: torch.Tensor | None, wanted: str = "'layer' or 'rms'"
) -> None:
    """That norm names a norm, and that an RMS norm has no bias.

    Args:
        wanted: the names that the op takes, for the error's text.

    Raises:
        InputValueError: it does not, or it has one.
    """
    if norm not in KINDS:
        raise InputValueError(f"{op}: norm must be {wanted}, got {norm!r}")
    if norm == "rms" and bias is not None:
        raise InputValueError(f"{op}: norm='rms' takes no bias")


def check_residual(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor,
    gamma: torch.Tensor | None,
    drop_scale: torch.Tensor | None,
) -> None:
    """What holds for every residual connection x [..., C] + drop_scale [B] * gamma [C] * branch.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
    """
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "branch", branch)
    if x.ndim == 0:
        raise InputValueError(f"{op}: x must have at least one dimension, got a scalar")
    checks.check_shape(op, "branch", branch, tuple(x.shape))
    if gamma is not None:
        checks.check_tensor(op, "gamma", gamma)
        checks.check_shape(op, "gamma", gamma, (x.shape[-1],))
    if drop_scale is not None:
        checks.check_tensor(op, "drop_scale", drop_scale)
        if x.ndim == 1:
            raise InputValueError(f"{op}: drop_scale needs x [B, ..., C], got {x.ndim}-D x")
        checks.check_shape(op, "drop_scale", drop_scale, (x.shape[0],))
    checks.check_same_device(op, x=x, branch=branch, gamma=gamma, drop_scale=drop_scale)


def autocast_out_dtype(x: torch.Tensor) -> torch.dtype | None:
    """torch's autocast rule for norms: float32 on CUDA, none on the CPU."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or autocast_dtype(x.device) is None:
        return None
    return torch.float32
