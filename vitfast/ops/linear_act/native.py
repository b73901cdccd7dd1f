"""linear_act on the kernels of csrc/cpu/gemm.cpp and csrc/cpu/linear_backward.cpp."""

from __future__ import annotations

import torch

from vitfast.ops.common import gemm
from vitfast.runtime import native
from vitfast.runtime.dispatch import Backend

_MOST_SUMMED = 4096
"""Rows of x packed at a time for a weight's gradient: bounds the memory, and the float32 sums."""


def can_run(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    why = gemm.reasons(x, weight, bias, gate_weight, gate_bias)
    if weight.shape[1] == 0:
        why.append("there are no input channels to sum over")
    return why


def forward(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    lead, n = x.shape[:-1], weight.shape[0] // (2 if gate else 1)
    y = native.empty((*lead, n), x.dtype)
    gated = bool(gate) or gate_weight is not None
    save = save_z and (gated or act != "none")
    z = native.empty((*lead, 2 * n if gated else n), x.dtype) if save else x.new_empty(0)
    if y.numel():
        rows = x.numel() // x.shape[-1]
        weights = (weight,) if gate_weight is None else (gate_weight, weight)
        b = gemm.matrix(weights, x.dtype, rows, gate=gate)
        bias = gemm.biases(bias, gate, gate_weight, gate_bias)
        halves = _halves(z, gate) if gated else (z, None)
        gemm.product(b, x, y, bias, act, z=halves if save else (None, None))
    return y, z


def _halves(z, gate):
    """Of the pre-activations, the half that passes through the activation, and the other."""
    first, second = z.chunk(2, -1)
    return (second, first) if gate == "last" else (first, second)


def activation(z, act, gate):
    """act(z), or of a packed z the product of its halves, one of them through act.

    The kernel of gated gradients, which gives grad * act(z), with the other half for grad.
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


def backward(grad, x, weight, bias, gate_weight, gate_bias, z, act, gate, wanted):
    inputs = (x, weight, bias, gate_weight, gate_bias)
    found = [
        t.new_empty(t.shape) if w and t is not None else x.new_empty(0)
        for t, w in zip(inputs, wanted, strict=True)
    ]
    if not grad.numel():
        return tuple(f.zero_() for f in found)
    gated = bool(gate) or gate_weight is not None
    dz = _sums_gradient(grad, z, bias, gate_bias, act, gate, gated, wanted, found)
    n = grad.shape[-1]
    parts = [(weight, found[1], dz)]
    if gate_weight is not None:
        parts = [(gate_weight, found[3], dz[:, :n]), (weight, found[1], dz[:, n:])]
    if wanted[0]:
        _input_gradient(parts, found[0])
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _weight_gradients([(d, dz) for _, d, dz in parts if d.numel()], rows)
    return tuple(found)


def _sums_gradient(grad, z, bias, gate_bias, act, gate, gated, wanted, found):
    """Gradient of the sums before the activation, [M, N] (gated [M, 2N]); fills those of biases."""
    n = grad.shape[-1]
    grad = gemm.dense_rows(grad)
    m = grad.numel() // n
    # Sums over rows in float32, in the order of z's columns.
    total = torch.zeros(2 * n if gated else n, dtype=torch.float32, device="cpu")
    identity = act == "none" and not gated
    dz = None if identity else native.empty((m, total.numel()), grad.dtype)
    both, dboth, sums = (z, None), (dz, None), (total, None)
    if gated:
        z = z.view(m, 2 * n)
        both, dboth, sums = _halves(z, gate), _halves(dz, gate), _halves(total, gate)
    if not identity or wanted[2]:
        native.native().linear_backward(
            m,
            n,
            gemm.ACTS[act],
            gemm.rows_of(grad),
            None if identity else gemm.rows_of(both[0]),
            None if both[1] is None else gemm.rows_of(both[1]),
            None if identity else gemm.rows_of(dboth[0]),
            None if dboth[1] is None else gemm.rows_of(dboth[1]),
            native.address(sums[0]),
            native.address(sums[1]),
            native.threads(),
        )
    if wanted[2]:
        # With two weights the gate's half comes first.
        found[2].copy_(total[-bias.numel() :])
    if wanted[4]:
        found[4].copy_(total[: gate_bias.numel()])
    if dz is None:
        dz = grad.reshape(m, n)
        dz = dz if dz.stride(1) == 1 else dz.contiguous()
    return dz


def _input_gradient(parts, dx):
    """dx = sum over the weights of dz W; more than one are added up in float32."""
    total = dx if len(parts) == 1 else native.empty(dx.shape, torch.float32)
    for i, (weight, _, dz) in enumerate(parts):
        b = gemm.matrix((weight,), dx.dtype, len(dz), transposed=True)
        out = dx if i == len(parts) - 1 else total
        gemm.product(b, dz, out, residual=total if i else None)


def _weight_gradients(parts, x):
    """dW = dz^T x for each weight, a stretch of rows at a time."""
    totals = [_float_total(dweight, len(x)) for dweight, _ in parts]
    for begin in range(0, len(x) if parts else 0, _MOST_SUMMED):
        stretch = x[begin : begin + _MOST_SUMMED]
        outputs = max(dz.shape[1] for _, dz in parts)
        b = gemm.matrix((stretch,), x.dtype, outputs, transposed=True)
        for total, (_, dz) in zip(totals, parts, strict=True):
            gemm.transposed_product(
                b, dz[begin : begin + _MOST_SUMMED], total, accumulate=begin > 0
            )
    for total, (dweight, _) in zip(totals, parts, strict=True):
        if total.data_ptr() != dweight.data_ptr():
            dweight.copy_(total.view(dweight.shape))


def _float_total(dweight, m):
    """Where sums go: the gradient itself, unless several stretches must meet in float32."""
    if dweight.dtype == torch.float32 or m <= _MOST_SUMMED:
        return dweight.view(dweight.shape[0], -1)
    return torch.empty(
        (dweight.shape[0], dweight[0].numel()), dtype=torch.float32, device=dweight.device
    )


BACKEND = Backend("cpu", forward, can_run, backward, native.reasons)
