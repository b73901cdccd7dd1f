"""Matrix products on csrc/cpu/gemm.h: what ops and the engine call them with.

Nothing here checks what it is given: shapes are the caller's promise. Weights are read where they
lie and put in order in the kernel, or for products of many rows once beforehand, for this one call;
inference keeps them in order (`engine.products`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vitfast.runtime import native
from vitfast.runtime.native import DTYPE_CODES

ACTS = {
    "none": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "quick_gelu": 4,
    "silu": 5,
    "sigmoid": 6,
}
"""The numbers of `Act` in csrc/cpu/activation_kinds.h."""
DTYPES = (torch.float32, torch.bfloat16)
_PACKED_ROWS = 512
"""From so many rows on, B is put in order once, beforehand, instead of by every block of rows.
Chosen, not measured yet; inference keeps most weights in order anyway."""

Rows = tuple[int, int, int, int, int]


def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX): oneDNN's bfloat16 is then far ahead."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe is not None and probe())


HAS_TILES = has_tiles()
_PAIRS = "avx512_bf16"
"""The instruction set that multiplies pairs of bfloat16."""


def reasons(x: torch.Tensor, *others: torch.Tensor | None) -> list[str]:
    """Why the native kernel cannot take these tensors; empty when it can."""
    why = native.reasons()
    if x.device.type != "cpu":
        why.append(f"tensors are on {x.device}, not on the CPU")
    for dtype in {t.dtype for t in (x, *others) if t is not None}:
        if dtype not in DTYPES:
            why.append(f"{dtype} is not implemented, float32 and bfloat16 are")
    return why


class Matrix(NamedTuple):
    """B of a product, [k, n] (gated: two of them), for the native call; keeps its memory alive."""

    native: tuple[int, int, int, int, int, int, int]
    packed: torch.Tensor | None
    n: int
    k: int
    dtype: torch.dtype
    memory: tuple[torch.Tensor, ...]


def matrix(
    weights: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rows: int,
    *,
    gate: str = "",
    transposed: bool = False,
) -> Matrix:
    """B for y = x W^T (transposed: y = x W) with `rows` rows in all, in products of `dtype`.

    Args:
        weights: [N, K] or with more dimensions after N, float32 or bfloat16, any strides; or the
            gate's weight and another one of its shape and dtype.
        gate: "first" or "last" for one weight [2N, K] that holds both, by the half that passes
            through the activation.
    """
    first = weights[0]
    first = first if first.ndim == 2 else first.flatten(1)
    second = None
    if gate:
        first, second = first.chunk(2) if gate == "first" else reversed(first.chunk(2))
    elif len(weights) > 1:
        second = weights[1] if weights[1].ndim == 2 else weights[1].flatten(1)
        if second.stride() != first.stride():
            first, second = first.contiguous(), second.contiguous()
    (n, k), (n_stride, k_stride) = first.shape, first.stride()
    if transposed:
        n, k, n_stride, k_stride = k, n, k_stride, n_stride
    b = (
        native.address(first),
        native.address(second),
        DTYPE_CODES[first.dtype],
        n,
        k,
        n_stride,
        k_stride,
    )
    memory = (first,) if second is None else (first, second)
    found = Matrix(b, None, n, k, dtype, memory)
    return found._replace(packed=in_order(found)) if rows >= _PACKED_ROWS else found


def in_order(b: Matrix) -> torch.Tensor:
    """The elements of B as products read them with this instruction set."""
    module, code = native.native(), DTYPE_CODES[b.dtype]
    packed = torch.empty(
        module.gemm_packed_bytes(b.native, code) // 4, dtype=torch.float32, device="cpu"
    )
    module.gemm_pack(b.native, code, packed.data_ptr(), native.threads())
    return packed


def product(
    b: Matrix,
    x: torch.Tensor,
    out: torch.Tensor,
    bias: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    act: str = "none",
    *,
    z: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """out = residual + gamma * act(x B + bias); see csrc/cpu/gemm.h.

    Args:
        bias, z: bias and sums before the activation (written), each also for the gate.
    """
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    gamma = None if gamma is None else gamma.contiguous()
    native.native().gemm(
        x.numel() // b.k,
        DTYPE_CODES[b.dtype],
        rows_of(x),
        False,
        b.native,
        native.address(b.packed),
        _vector(bias[0]),
        _vector(bias[1]),
        ACTS[act],
        None if z[0] is None else rows_of(z[0]),
        None if z[1] is None else rows_of(z[1]),
        _vector(gamma),
        None if residual is None else rows_of(residual),
        rows_of(out),
        native.threads(),
    )


def transposed_product(b: Matrix, x: torch.Tensor, out: torch.Tensor, *, accumulate: bool) -> None:
    """out[I, n] (+)= x^T B for x [k, I] with contiguous rows; a float32 `out` may accumulate."""
    total = rows_of(out)
    native.native().gemm(
        x.shape[1],
        DTYPE_CODES[b.dtype],
        (native.address(x), DTYPE_CODES[x.dtype], 1, 0, x.stride(0)),
        True,
        b.native,
        native.address(b.packed),
        None,
        None,
        0,
        None,
        None,
        None,
        total if accumulate else None,
        total,
        native.threads(),
    )


def biases(
    bias: torch.Tensor | None,
    gate: str,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The biases of the half that passes through the activation, and of the other one."""
    bias = None if bias is None else bias.contiguous()
    if gate_weight is not None:
        return (None if gate_bias is None else gate_bias.contiguous()), bias
    if gate and bias is not None:
        first, second = bias.chunk(2)
        return (first, second) if gate == "first" else (second, first)
    return bias, None


def rows_of(t: torch.Tensor) -> Rows:
    """Address, dtype, rows in a group, stride of groups, stride of rows; t from `dense_rows`."""
    code = DTYPE_CODES[t.dtype]
    if t.is_contiguous():
        width = t.shape[-1]
        return native.address(t), code, max(t.numel() // width, 1), 0, width
    rows, inner, outer = 1, 0, 0
    for size, stride in reversed(_outer_dims(t)):
        if rows == 1:
            rows, inner = size, stride
        elif stride == rows * inner:
            rows *= size
        else:
            outer = stride
            break
    return native.address(t), code, rows, outer, inner


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor where `rows_of` can describe it, else a contiguous copy."""
    if t.is_contiguous() or (t.stride(-1) == 1 and _groups(t) <= 2):
        return t
    return t.contiguous()


def _outer_dims(t: torch.Tensor) -> list[tuple[int, int]]:
    dims = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return [(size, stride) for size, stride in dims if size != 1]


def _groups(t: torch.Tensor) -> int:
    """How many dimensions the outer ones are, once those that run together are one."""
    count, previous = 0, None
    for size, stride in _outer_dims(t):
        if previous is None or previous != size * stride:
            count += 1
        previous = stride
    return count


def _vector(t: torch.Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (native.address(t), DTYPE_CODES[t.dtype])
