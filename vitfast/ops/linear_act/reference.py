"""Linear layer with its activation, plain or gated, in plain PyTorch: the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitfast.ops.common.autodiff import gradients
from vitfast.runtime.library import without_autocast

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class Call(NamedTuple):
    """The arguments of `vitfast::linear_act` before `backend`, in the order of its schema.

    Backends compute from `x` alone; the five fields after it only say how x can be made again for
    the backward (see `vitfast.ops.common.recompute`).

    Args:
        x, weight, bias, gate_weight, gate_bias, act: as in `vitfast.ops.linear_act`.
        source: the tensor [..., K] that x is the norm of; None if x itself is to be saved.
        norm_weight, norm_bias, eps: of that norm, [K], [K] and a number.
        kind: that norm's, "layer" or "rms"; "" without a source.
        gate: "first" or "last" as in `vitfast.ops.linear_act`; "" for None.
        save_z: whether the pre-activation is returned too, for the backward.
    """

    x: torch.Tensor
    source: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None
    act: str
    gate: str
    save_z: bool

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        act: str = "none",
        gate: str = "",
        *,
        gate_weight: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
        save_z: bool = False,
    ) -> Call:
        """A call whose x is not said to be the norm of anything."""
        return cls(
            x, None, None, None, 1e-6, "", weight, bias, gate_weight, gate_bias, act, gate, save_z
        )

    @property
    def gated(self) -> bool:
        """Whether the result is the product of two linear layers, one of them activated."""
        return bool(self.gate) or self.gate_weight is not None

    @property
    def width(self) -> int:
        """Channels N of the result."""
        return output_width(self.weight, self.gate)

    @property
    def saved_width(self) -> int | None:
        """Channels of the pre-activation that the backward needs; None where it needs none.

        Halves of a gated layer lie side by side: as in the packed weight, or gate before value.
        """
        if self.gated:
            return 2 * self.width
        return None if self.act == "none" else self.width


def output_width(weight: torch.Tensor, gate: str) -> int:
    """Channels of the result of a weight; `gate` as in `Call`."""
    return weight.shape[0] // 2 if gate else weight.shape[0]


INPUTS = ("x", "weight", "bias", "gate_weight", "gate_bias")
"""Differentiable inputs, in the order of the outputs of `vitfast::linear_act_backward`."""


class BackwardCall(NamedTuple):
    """The arguments of `vitfast::linear_act_backward` before `backend`, in its schema's order.

    Args:
        grad: [..., N], the gradient of the result.
        x: what the forward saved for x: x, or the source of the norm where `kind` names one.
            Backends get x itself here, or, where they read no more of it than shape and dtype, any
            tensor of x's shape and dtype.
        z: [..., N or 2N], the pre-activation that the forward saved, or an empty tensor.
        wanted: whether the gradient is asked for, for each of `INPUTS`.

    The other fields are as in `Call`.
    """

    grad: torch.Tensor
    x: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    eps: float
    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None
    z: torch.Tensor
    act: str
    gate: str
    wanted: list[bool]

    @classmethod
    def of(
        cls, grad: torch.Tensor, call: Call, z: torch.Tensor, wanted: list[bool]
    ) -> BackwardCall:
        """The backward of a call, whose x is at hand."""
        weights = (call.weight, call.bias, call.gate_weight, call.gate_bias)
        return cls(grad, call.x, None, None, 1e-6, "", *weights, z, call.act, call.gate, wanted)

    @property
    def forward_call(self) -> Call:
        """The call that this is the backward of, without what x is the norm of."""
        return Call.of(
            self.x,
            self.weight,
            self.bias,
            self.act,
            self.gate,
            gate_weight=self.gate_weight,
            gate_bias=self.gate_bias,
            save_z=True,
        )

    @property
    def gated(self) -> bool:
        """As of `Call`."""
        return bool(self.gate) or self.gate_weight is not None

    @property
    def multiplies_x(self) -> bool:
        """Whether a weight's gradient is asked for, the only one that x takes part in."""
        return self.wanted[1] or self.wanted[3]


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    *,
    gate: str | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x W^T + b); gated, the product of one linear layer and the activation of another.

    Weights and biases are rounded to x's dtype, as autocast does.
    """
    z = _linear(x, weight, bias)
    if gate_weight is not None:
        return activate(_linear(x, gate_weight, gate_bias), z, act, "first")
    if gate is None:
        return ACTIVATIONS[act](z)
    return activate_packed(z, act, gate)


def forward(
    call: Call,
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [..., N] of a call, and what the backward needs: one product for each weight.

    Args:
        linear: x W^T + b of (x, weight, bias), rounded to x's dtype; torch's own by default.
    """
    linear = linear or _linear
    z = linear(call.x, call.weight, call.bias)
    if call.gate_weight is not None:
        gate_z = linear(call.x, call.gate_weight, call.gate_bias)
        y = activate(gate_z, z, call.act, "first")
        z = torch.cat((gate_z, z), -1) if call.save_z else z
    elif call.gate:
        y = activate_packed(z, call.act, call.gate)
    else:
        y = ACTIVATIONS[call.act](z)
    return y, z if call.save_z and call.saved_width is not None else call.x.new_empty(0)


def backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients for `INPUTS`, empty where not wanted: one product for each of x and the weights."""
    with without_autocast(call.x.device):
        return _backward(call)


def _backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    x, act, wanted = call.x, call.act, call.wanted
    size = math.prod(x.shape[:-1])
    rows, grad = x.reshape(size, x.shape[-1]), call.grad.reshape(size, call.grad.shape[-1])
    if call.gated:
        side = call.gate or "first"
        z = call.z.reshape(size, call.z.shape[-1])
        (dz,) = gradients(lambda z: activate_packed(z, act, side), (z,), (grad,))
    elif act != "none":
        z = call.z.reshape(size, call.z.shape[-1])
        (dz,) = gradients(ACTIVATIONS[act], (z,), (grad,))
    else:
        dz = grad
    n = call.weight.shape[0]
    parts = [(call.weight, call.bias, dz, 1)]
    if call.gate_weight is not None:
        parts = [
            (call.gate_weight, call.gate_bias, dz[:, :n], 3),
            (call.weight, call.bias, dz[:, n:], 1),
        ]
    found = [x.new_empty(0) for _ in range(5)]
    dx = None
    for w, b, d, at in parts:
        if wanted[0]:
            part = d @ w.flatten(1).to(d.dtype)
            dx = part if dx is None else dx + part
        if wanted[at]:
            found[at] = (d.mT @ rows).view(w.shape).to(w.dtype)
        if b is not None and wanted[at + 1]:
            wide = torch.promote_types(d.dtype, torch.float32)
            found[at + 1] = d.sum(0, dtype=wide).to(b.dtype)
    if dx is not None:
        found[0] = dx.view(x.shape)
    return tuple(found)


def activate(first: torch.Tensor, second: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """The product of two halves, one of them through the activation."""
    if gate == "first":
        return ACTIVATIONS[act](first) * second
    return first * ACTIVATIONS[act](second)


def activate_packed(z: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """`activate` of the two halves of z [..., 2N]."""
    first, second = z.chunk(2, -1)
    return activate(first, second, act, gate)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = weight.flatten(1).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
