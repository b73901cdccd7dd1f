"""linear_act on the kernels of csrc/cpu/gemm.cpp and csrc/cpu/linear_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitfast.ops.common import gemm
from vitfast.ops.linear_act.reference import INPUTS, BackwardCall, Call
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend

_ROWS_AT_A_TIME = 4096
"""Rows of x packed at a time for a weight's gradient: bounds the memory, and the float32 sums.
Chosen, not measured yet."""


def can_run(call: Call) -> list[str]:
    why = gemm.reasons(*(getattr(call, name) for name in INPUTS))
    if call.weight.shape[1] == 0:
        why.append("there are no input channels to sum over")
    return why


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    x, gated, width = call.x, call.gated, call.saved_width
    lead = x.shape[:-1]
    y = native.empty((*lead, call.width), x.dtype)
    save = call.save_z and width is not None
    z = native.empty((*lead, width or 0), x.dtype) if save else x.new_empty(0)
    if y.numel():
        rows = x.numel() // x.shape[-1]
        weights = (call.weight,) if call.gate_weight is None else (call.gate_weight, call.weight)
        b = gemm.matrix(weights, x.dtype, rows, gate=call.gate)
        bias = gemm.biases(call.bias, call.gate, call.gate_weight, call.gate_bias)
        halves = _halves(z, call.gate) if gated else (z, None)
        gemm.product(b, x, y, bias, call.act, z=halves if save else (None, None))
    return y, z


def _halves(z: torch.Tensor, gate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the pre-activations, the half that passes through the activation, and the other."""
    first, second = z.chunk(2, -1)
    return (second, first) if gate == "last" else (first, second)


def activation(z: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """act(z), or of a packed z the product of its halves, one of them through act.

    The kernel of gated gradients computes it: that gives grad * act(z), with the other half for
    grad.
    """
    width = z.shape[-1] // 2 if gate else z.shape[-1]
    y = native.empty((*z.shape[:-1], width), z.dtype)
    if y.numel() == 0:
        return y
    m = y.numel() // width
    through, other = _halves(z, gate) if gate else (z, z.new_ones(width).expand(m, width))
    native.native().linear_backward(
        m, width, gemm.ACTS[act], gemm.rows_of(other), gemm.rows_of(through),
        gemm.rows_of(other), None, gemm.rows_of(y), 0, 0, native.threads(),
    )  # fmt: skip
    return y


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    x, grad = call.x, call.grad
    found = {
        name: x.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)
        for name, t, wanted in zip(
            INPUTS, (getattr(call, n) for n in INPUTS), call.wanted, strict=True
        )
    }
    if not grad.numel():
        return tuple(f.zero_() for f in found.values())
    dz = _sums_gradient(call, found)
    n = grad.shape[-1]
    parts = [(call.weight, found["weight"], dz)]
    if call.gate_weight is not None:
        parts = [
            (call.gate_weight, found["gate_weight"], dz[:, :n]),
            (call.weight, found["weight"], dz[:, n:]),
        ]
    if call.wanted[0]:
        _input_gradient([(weight, part) for weight, _, part in parts], found["x"])
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _weight_gradients([(d, part) for _, d, part in parts if d.numel()], rows)
    return tuple(found.values())


def _sums_gradient(call: BackwardCall, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradient of the sums before the activation, [M, N] (gated [M, 2N]); fills those of biases.

    Args:
        found: the gradients by name, of which those of wanted biases are written.
    """
    gated, n = call.gated, call.grad.shape[-1]
    grad = gemm.dense_rows(call.grad)
    m = grad.numel() // n
    # Sums over rows in float32, in the order of z's columns.
    total = torch.zeros(2 * n if gated else n, dtype=torch.float32, device="cpu")
    identity = call.act == "none" and not gated
    dz = None if identity else native.empty((m, total.numel()), grad.dtype)
    # Each as the half that passes through the activation, and the other one.
    z: tuple[torch.Tensor | None, ...] = (None if identity else call.z, None)
    dsums: tuple[torch.Tensor | None, ...] = (dz, None)
    sums: tuple[torch.Tensor | None, ...] = (total, None)
    if gated:
        assert dz is not None  # a gated layer is no identity
        z = _halves(call.z.view(m, 2 * n), call.gate)
        dsums, sums = _halves(dz, call.gate), _halves(total, call.gate)
    if not identity or call.wanted[2]:
        native.native().linear_backward(
            m,
            n,
            gemm.ACTS[call.act],
            gemm.rows_of(grad),
            *(None if t is None else gemm.rows_of(t) for t in (*z, *dsums)),
            *(native.address(t) for t in sums),
            native.threads(),
        )
    if call.wanted[2]:
        # With two weights the gate's half comes first.
        found["bias"].copy_(total[-found["bias"].numel() :])
    if call.wanted[4]:
        found["gate_bias"].copy_(total[: found["gate_bias"].numel()])
    if dz is None:
        dz = grad.reshape(m, n)
        dz = dz if dz.stride(1) == 1 else dz.contiguous()
    return dz


def _input_gradient(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], dx: torch.Tensor) -> None:
    """dx = sum over pairs of a weight and its dz of dz W; more than one are added up in float32."""
    total = dx if len(parts) == 1 else native.empty(dx.shape, torch.float32)
    for i, (weight, dz) in enumerate(parts):
        b = gemm.matrix((weight,), dx.dtype, len(dz), transposed=True)
        out = dx if i == len(parts) - 1 else total
        gemm.product(b, dz, out, residual=total if i else None)


def _weight_gradients(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> None:
    """dW = dz^T x for pairs of dW (written) and dz, a stretch of rows at a time."""
    totals = [_float_total(dweight, len(x)) for dweight, _ in parts]
    for begin in range(0, len(x) if parts else 0, _ROWS_AT_A_TIME):
        stretch = x[begin : begin + _ROWS_AT_A_TIME]
        outputs = max(dz.shape[1] for _, dz in parts)
        b = gemm.matrix((stretch,), x.dtype, outputs, transposed=True)
        for total, (_, dz) in zip(totals, parts, strict=True):
            gemm.transposed_product(
                b, dz[begin : begin + _ROWS_AT_A_TIME], total, accumulate=begin > 0
            )
    for total, (dweight, _) in zip(totals, parts, strict=True):
        if total.data_ptr() != dweight.data_ptr():
            dweight.copy_(total.view(dweight.shape))


def _float_total(dweight: torch.Tensor, m: int) -> torch.Tensor:
    """Where sums go: the gradient itself, unless several stretches must meet in float32."""
    if dweight.dtype == torch.float32 or m <= _ROWS_AT_A_TIME:
        return dweight.view(dweight.shape[0], -1)
    return torch.empty(
        (dweight.shape[0], dweight[0].numel()), dtype=torch.float32, device=dweight.device
    )


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
