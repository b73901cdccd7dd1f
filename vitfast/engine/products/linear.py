"""Linear layers and MLPs prepared for inference: the faster of oneDNN and csrc/cpu/gemm.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from vitfast.engine import rows as by_rows
from vitfast.engine.products import onednn
from vitfast.engine.products.onednn import EXACT_WIDTH, columns
from vitfast.engine.products.weights import CACHE, worth_keeping
from vitfast.ops.common import gemm
from vitfast.ops.common.gemm import DTYPES, HAS_TILES, Matrix
from vitfast.plans import Linear, Mlp
from vitfast.runtime import native
from vitfast.runtime.native import DTYPE_CODES
from vitfast.settings import settings

_FEW_ROWS = 1000
"""Below it oneDNN's blocks fit badly: the table of GFLOP/s by rows in benchmarks/README.md."""


def kept_matrix(
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
        return matrix_of_packed(
            weight, dtype, gemm.in_order(gemm.matrix((rows,), dtype, 0, gate=gate)), gate
        )

    return CACHE.get(weight, dtype, ("in order", native.isa(), gate, channels_last), pack)


def matrix_of_packed(
    weight: torch.Tensor, dtype: torch.dtype, packed: torch.Tensor, gate: str = ""
) -> Matrix:
    """B of a weight [N, ...] whose elements are `in_order`."""
    n, k = weight.shape[0] // (2 if gate else 1), columns(weight)
    address = weight.data_ptr()  # not read any more
    b = (address, address if gate else 0, DTYPE_CODES[weight.dtype], n, k, k, 1)
    return Matrix(b, packed, n, k, dtype, ())


class GemmLinear(NamedTuple):
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


def is_gemm_faster(rows: int, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products of so many rows in all take less time here than on oneDNN, weights in order.

    Its blocks fit few rows badly: it takes up to 1.5 times as long. In float32 it has to sum many
    columns in pieces.
    """
    if dtype == torch.bfloat16 and (HAS_TILES or native.reasons() or native.isa() != gemm._PAIRS):
        return False
    return rows < _FEW_ROWS or (dtype == torch.float32 and columns(weight) > EXACT_WIDTH)


def prepare_gemm(
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
) -> GemmLinear:
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
        b = kept_matrix(weight, dtype, gate, channels_last)
    else:
        if channels_last:
            weight = _channels_last(weight)
        if fits:
            weights = (weight,) if gate_weight is None else (gate_weight, weight)
            CACHE.note(*weights)
            b = gemm.matrix(weights, dtype, rows, gate=gate)
    return GemmLinear(b, weight, bias, gate, gate_weight, gate_bias)


def _is_read(t: torch.Tensor | None) -> bool:
    """Whether the kernel reads this tensor, as `gemm.reasons` but without the words: inference asks
    for every layer."""
    return t is None or (t.is_cpu and t.dtype in DTYPES)


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


def _is_plain(weight: torch.Tensor) -> bool:
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return plain and (weight.ndim == 2 or weight.is_contiguous())


def apply_gemm(
    layer: GemmLinear,
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
    gemm.product(
        layer.matrix,
        x,
        out,
        gemm.biases(layer.bias, layer.gate, layer.gate_weight, layer.gate_bias),
        act,
        gamma=gamma,
        residual=residual,
    )
    return out


def _through_op(
    layer: GemmLinear,
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


class PreparedLinear(NamedTuple):
    """A linear layer ready to run. own: on our own kernel, which can add as it writes."""

    run: onednn.Linear | Callable[[torch.Tensor], torch.Tensor]
    own: GemmLinear | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """self(x) into `out`."""
        if self.own is None:
            out.copy_(self.run(x))
        else:
            apply_gemm(self.own, x, out=out)

    def add_to(
        self, residual: torch.Tensor, gamma: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """residual + gamma * self(x) into `out`, which may be the residual."""
        if self.own is None:
            by_rows.add(residual, self.run(x), gamma, out)
        else:
            apply_gemm(self.own, x, residual=residual, gamma=gamma, out=out)


class PreparedMlp(NamedTuple):
    """fc1 and fc2 of an MLP, prepared: call `hidden(x)`, then the result on what it gives.

    hidden: rows x [M, C] to the hidden tensor, in pieces of columns, each a contiguous tensor.
    output: the pieces to fc2's result [M, C'].
    fc2: the second layer itself where the hidden tensor is one piece; None where it is several.
    """

    hidden: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    output: onednn.Mlp | Callable[[Sequence[torch.Tensor]], torch.Tensor]
    fc2: PreparedLinear | None

    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.output(hidden)

    def add_to(
        self,
        residual: torch.Tensor,
        gamma: torch.Tensor | None,
        hidden: Sequence[torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """residual + gamma * self(hidden) into `out`, which may be the residual."""
        if self.fc2 is None:
            by_rows.add(residual, self(hidden), gamma, out)
        else:
            self.fc2.add_to(residual, gamma, hidden[0], out)


def prepare_mlp(plan: Mlp, rows: int, dtype: torch.dtype) -> PreparedMlp:
    """An MLP for so many rows in all, of this dtype."""
    fc1, fc2 = plan.fc1, plan.fc2
    plain = plan.packed is None and plan.gate is None and plan.norm is None
    if (
        plain
        and _is_for_onednn(fc1, rows, dtype, plan.act)
        and not onednn.reasons(fc2.weight, fc2.bias, dtype, "none")
    ):
        both = onednn.prepare_mlp(fc1.weight, fc1.bias, fc2.weight, fc2.bias, rows, dtype, plan.act)
        return PreparedMlp(both.hidden, both, None)
    first = prepare_linear(fc1, rows, dtype, plan.act, plan.packed, plan.gate)
    second = prepare_linear(fc2, rows, dtype)
    return PreparedMlp(lambda x: [first(x)], lambda hidden: second(hidden[0]), second)


def prepare_linear(
    layer: Linear,
    rows: int,
    dtype: torch.dtype,
    act: str = "none",
    packed: str | None = None,
    gate: Linear | None = None,
    channels_last: bool = False,
) -> PreparedLinear:
    """The faster of oneDNN and our own kernel, which has every activation and gate.

    Args:
        channels_last: the weight is [N, C, H, W], of rows [H, W, C].
    """
    plain = packed is None and gate is None
    if plain and _is_for_onednn(layer, rows, dtype, act):
        return PreparedLinear(onednn.prepare(*layer, rows, dtype, act, channels_last), None)
    gate_weight, gate_bias = gate or (None, None)
    prepared = prepare_gemm(
        *layer,
        rows,
        dtype,
        gate=packed,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        keep=True,
        channels_last=channels_last,
    )
    adds = prepared.matrix is not None and act == "none"
    return PreparedLinear(partial(apply_gemm, prepared, act=act), prepared if adds else None)


def _is_for_onednn(layer: Linear, rows: int, dtype: torch.dtype, act: str) -> bool:
    """Whether oneDNN runs this layer, and no slower than our own kernel."""
    faster = is_gemm_faster(rows, layer.weight, dtype)
    return not faster and not onednn.reasons(*layer, dtype, act)
