"""Matrix products on csrc/cpu/gemm.h, for ops and for the inference path of layers.

`linear` is what a layer calls without autograd; for several row chunks through one weight it calls
`prepare` once and `apply` for each. They check nothing: shapes are the caller's promise. Where the
native kernel cannot or should not run, they go through the op `linear_act`.

Weights are read where they lie and put in order in the kernel, or for products of many rows once
beforehand, for this one call; inference keeps them in order (`_weight_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vitfast.ops._onednn import EXACT_WIDTH, columns
from vitfast.ops._weight_cache import CACHE, worth_keeping
from vitfast.runtime import native
from vitfast.runtime.native import DTYPE_CODES
from vitfast.settings import settings

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
_FEW_ROWS = 1000
_PACKED_ROWS = 512
"""From so many rows on, B is put in order once, beforehand, instead of by every block of rows."""

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


def kept(
    weight: torch.Tensor,
    dtype: torch.dtype,
    gate: str = "",
    channels_last: bool = False,
) -> Matrix:
    """B as of `matrix`, in order and kept for as long as its weight stays what it is.

    Args:
        weight: plain, [N, K] or dense with more dimensions after N.
        channels_last: it is [N, C, H, W], of rows [H, W, C].
    """

    def pack(weight: torch.Tensor, dtype: torch.dtype) -> Matrix:
        rows = _channels_last(weight) if channels_last else weight.detach()
        return of_packed(weight, dtype, in_order(matrix((rows,), dtype, 0, gate=gate)), gate)

    return CACHE.get(weight, dtype, ("in order", native.isa(), gate, channels_last), pack)


def of_packed(
    weight: torch.Tensor, dtype: torch.dtype, packed: torch.Tensor, gate: str = ""
) -> Matrix:
    """B of a weight [N, ...] whose elements are `in_order`."""
    n, k = weight.shape[0] // (2 if gate else 1), columns(weight)
    address = weight.data_ptr()  # not read any more
    b = (address, address if gate else 0, DTYPE_CODES[weight.dtype], n, k, k, 1)
    return Matrix(b, packed, n, k, dtype, ())


def in_order(b: Matrix) -> torch.Tensor:
    """The elements of B as products read them with this instruction set."""
    module, code = native.native(), DTYPE_CODES[b.dtype]
    packed = torch.empty(
        module.gemm_packed_bytes(b.native, code) // 4, dtype=torch.float32, device="cpu"
    )
    module.gemm_pack(b.native, code, packed.data_ptr(), native.threads())
    return packed


class Linear(NamedTuple):
    """A linear layer ready to run; without a matrix, through the op."""

    matrix: Matrix | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    gate: str
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None

    @property
    def width(self) -> int:
        return self.weight.shape[0] // 2 if self.gate else self.weight.shape[0]


def is_faster(rows: int, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products of so many rows in all take less time here than on oneDNN, weights in order.

    Its blocks fit few rows badly: it takes up to 1.5 times as long. In float32 it has to sum many
    columns in pieces.
    """
    if dtype == torch.bfloat16 and (HAS_TILES or native.reasons() or native.isa() != _PAIRS):
        return False
    return rows < _FEW_ROWS or (dtype == torch.float32 and columns(weight) > EXACT_WIDTH)


def prepare(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
    *,
    gate: str | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    keep: bool = False,
    channels_last: bool = False,
) -> Linear:
    """A layer for products with `rows` rows in all, in this dtype. Not to be kept between calls.

    Args:
        weight, bias, gate, gate_weight, gate_bias: as for `vitfast.ops.linear_act`; float32
            weights serve bfloat16 products.
        keep: the weight's order, unless the gate's weight is another one.
        channels_last: it is [N, C, H, W], of rows [H, W, C].
    """
    fits = (
        settings.backend in ("auto", "cpu")
        and not (HAS_TILES and dtype == torch.bfloat16)
        and dtype in DTYPES
        and weight.numel() > 0
        and not native.reasons()
        and _is_read(weight)
        and _is_read(bias)
        and _is_read(gate_weight)
        and _is_read(gate_bias)
    )
    gate = gate or ""
    keep = keep and gate_weight is None and _is_plain(weight) and worth_keeping(weight, rows)
    b = None
    if fits and keep:
        b = kept(weight, dtype, gate, channels_last)
    else:
        if channels_last:
            weight = _channels_last(weight)
        if fits:
            weights = (weight,) if gate_weight is None else (gate_weight, weight)
            CACHE.note(*weights)
            b = matrix(weights, dtype, rows, gate=gate)
    return Linear(b, weight, bias, gate, gate_weight, gate_bias)


def _is_read(t: torch.Tensor | None) -> bool:
    """As no `reasons`, without the words: inference asks for every layer."""
    return t is None or (t.is_cpu and t.dtype in DTYPES)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


def _is_plain(weight: torch.Tensor) -> bool:
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return plain and (weight.ndim == 2 or weight.is_contiguous())


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    *,
    residual: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    gate: str | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + gamma * act(x W^T + bias), without autograd; see `apply`."""
    layer = prepare(
        weight,
        bias,
        x.numel() // weight.shape[1] if weight.shape[1] else 0,
        x.dtype,
        gate=gate,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
    )
    return apply(layer, x, act, residual=residual, gamma=gamma, out_dtype=out_dtype, out=out)


def apply(
    layer: Linear,
    x: torch.Tensor,
    act: str = "none",
    *,
    residual: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + gamma * act(x W^T + bias), in one pass over memory.

    Args:
        x: [..., K], dtype of the layer, any strides.
        residual: [..., N], float32 or bfloat16.
        gamma: [N], float32 or bfloat16.
        out_dtype: by default the residual's, or x's.
        out: [..., N] to write to, with contiguous rows; may be the residual itself.
    """
    if out is None:
        dtype = out_dtype or (x if residual is None else residual).dtype
        out = native.empty((*x.shape[:-1], layer.width), dtype)
    if layer.matrix is None or not x.numel():
        return out.copy_(_through_op(layer, x, act, residual, gamma))
    product(
        layer.matrix,
        x,
        out,
        biases(layer.bias, layer.gate, layer.gate_weight, layer.gate_bias),
        act,
        gamma=gamma,
        residual=residual,
    )
    return out


def _through_op(
    layer: Linear,
    x: torch.Tensor,
    act: str,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.ops.vitfast.linear_act(
        *(x, None, None, None, 1e-6, ""),  # x is not said to be a norm of anything
        layer.weight,
        layer.bias,
        layer.gate_weight,
        layer.gate_bias,
        act,
        layer.gate,
        False,
        "auto",
    )[0]
    if gamma is not None:
        y = y * gamma
    return y if residual is None else residual + y


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
