"""The public `mlp`: meaning and checks; registration of `vitfast::mlp`.

A chain of two linear layers saves the pre-activation and the activation, 4C wide each. Here the
activation is computed again in the backward, and the norm before the MLP too where it is named:
of a ViT block's 18 saved units under bfloat16 autocast (a unit is B N C elements of 2 bytes) 13
remain. Its backends are those of `linear_act`, which does the work.
"""

from __future__ import annotations

import torch

from vitfast.errors import InputValueError
from vitfast.ops import _normed
from vitfast.ops._normed import Normed
from vitfast.ops.linear_act import api as linear
from vitfast.ops.linear_act import native
from vitfast.ops.linear_act.reference import ACTIVATIONS, activate
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None = None,
    act: str = "gelu",
    *,
    gate: str | None = None,
    normed: Normed | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """fc2(act(fc1(x))) (timm `Mlp`, `GluMlp`, `SwiGLUPacked`), saving what training needs once.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides.
        weight1, bias1: [N, K] and [N]; with `gate`, [2N, K] and [2N]: both halves.
        weight2, bias2: [M, N] and [M].
        act, gate: as for `linear_act`.
        normed: given where x is the norm of a tensor that is kept anyway (source, weight, bias,
            eps, "layer" or "rms"): x is then computed again instead of saved. It changes no
            result; gradients still flow to x.
        backend: "auto", or a name that then must be able to run.

    Returns:
        [..., M], contiguous, x's dtype (that of autocast where it is on).

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
        NotTwiceDifferentiableError: a gradient of a gradient was asked for.
    """
    tensors = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    for name, t in tensors.items():
        if t is not None or name in ("x", "weight1", "weight2"):
            checks.check_tensor("mlp", name, t)
    _check(x, weight1, bias1, weight2, bias2, act, gate, normed)
    checks.check_same_device("mlp", **tensors)
    lower = autocast_dtype(x.device)
    if lower is not None and x.dtype != torch.float64:
        x = x.to(lower)
    else:
        checks.check_same_dtype("mlp", **tensors)
    save = needs_grad(x, weight1, bias1, weight2, bias2)
    return _OP(
        x, *(normed or _normed.ABSENT), weight1, bias1, weight2, bias2, act, gate or "", save,
        backend,
    )[0]  # fmt: skip


def _check(x, weight1, bias1, weight2, bias2, act, gate, normed):
    if act not in ACTIVATIONS:
        raise InputValueError(f"mlp: act is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    if gate is not None and gate not in linear.GATES:
        raise InputValueError(f"mlp: gate is {gate!r}, expected None, 'first' or 'last'")
    if x.ndim == 0:
        raise InputValueError("mlp: x must have at least one dimension, got a scalar")
    for name, w in (("weight1", weight1), ("weight2", weight2)):
        if not (w.ndim == 2 or (w.ndim == 4 and w.shape[2:] == (1, 1))):
            raise InputValueError(
                f"mlp: {name} has shape {tuple(w.shape)}, expected [N, K] or [N, K, 1, 1]"
            )
    if x.shape[-1] != weight1.shape[1]:
        raise InputValueError(
            f"mlp: x has {x.shape[-1]} channels in shape {tuple(x.shape)}, "
            f"but weight1 takes {weight1.shape[1]} in shape {tuple(weight1.shape)}"
        )
    if gate is not None and weight1.shape[0] % 2:
        raise InputValueError(
            f"mlp: gate={gate!r} needs an even number of weight1 rows, got {weight1.shape[0]}"
        )
    hidden = linear.output_width(weight1, gate or "")
    if weight2.shape[1] != hidden:
        raise InputValueError(
            f"mlp: weight2 has shape {tuple(weight2.shape)}, but fc1 gives {hidden} channels"
        )
    checks.check_shape("mlp", "bias1", bias1, (weight1.shape[0],))
    checks.check_shape("mlp", "bias2", bias2, (weight2.shape[0],))
    _normed.check("mlp", x, normed)


def _on(backend: Backend) -> Backend:
    """Both layers on one backend of `linear_act`."""

    def can_run(x, weight1, bias1, weight2, bias2, act, gate, save):
        why = backend.can_run(x, weight1, bias1, None, None, act, gate, save)
        # The second layer's input is not there yet; its own weight stands for its width.
        return why or backend.can_run(
            weight2.flatten(1), weight2, bias2, None, None, "none", "", save
        )

    def forward(x, weight1, bias1, weight2, bias2, act, gate, save):
        hidden, z = backend.forward(x, weight1, bias1, None, None, act, gate, save)
        y, _ = backend.forward(hidden, weight2, bias2, None, None, "none", "", False)
        if not save:
            return y, x.new_empty(0)
        return y, hidden if act == "none" and not gate else z

    def backward(grad, x, weight1, bias1, weight2, bias2, z, act, gate, wanted):
        identity = act == "none" and not gate
        hidden = z if identity else _hidden(backend, z, act, gate)
        first = [wanted[0], wanted[1], wanted[2], False, False]
        second = [any(first), wanted[3], wanted[4], False, False]
        empty = x.new_empty(0)
        dhidden, dw2, db2, _, _ = backend.backward(
            grad, hidden, weight2, bias2, None, None, empty, "none", "", second
        )
        if not any(first):
            return empty, empty, empty, dw2, db2
        del hidden
        dx, dw1, db1, _, _ = backend.backward(
            dhidden, x, weight1, bias1, None, None, empty if identity else z, act, gate, first
        )
        return dx, dw1, db1, dw2, db2

    def unproven(x, weight1, bias1, weight2, bias2, act, gate, save):
        return backend.unproven(x, weight1, bias1, None, None, act, gate, save)

    return Backend(backend.name, forward, can_run, backward, backend.available, unproven)


def _hidden(backend: Backend, z: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """The activation, from the pre-activation."""
    if backend is native.BACKEND:
        return native.activation(z, act, gate)
    return activate(*z.chunk(2, -1), act, gate) if gate else ACTIVATIONS[act](z)


DISPATCHER = Dispatcher("mlp", [_on(b) for b in linear.DISPATCHER.backends.values()])


def _forward(
    x, source, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, act, gate, save,
    backend,
):  # fmt: skip
    args = (x, weight1, bias1, weight2, bias2, act, gate, save)
    return DISPATCHER.pick(backend, *args, needs_backward=save).forward(*args)


def _fake(
    x, source, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, act, gate, save,
    backend,
):  # fmt: skip
    lead = x.shape[:-1]
    y = x.new_empty((*lead, weight2.shape[0]))
    return y, x.new_empty((*lead, weight1.shape[0]) if save else 0)


def _backward(
    grad, x, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, z, act, gate,
    wanted, backend,
):  # fmt: skip
    x = _normed.again(x, norm_weight, norm_bias, eps, kind, z.dtype)
    args = (x, weight1, bias1, weight2, bias2, act, gate, True)
    return DISPATCHER.pick(backend, *args, needs_backward=True).backward(
        grad, x, weight1, bias1, weight2, bias2, z, act, gate, wanted
    )


def _backward_fake(
    grad, x, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, z, act, gate,
    wanted, backend,
):  # fmt: skip
    likes = (z.new_empty(x.shape), weight1, bias1, weight2, bias2)
    return tuple(
        t.new_empty(t.shape) if w and t is not None else z.new_empty(0)
        for t, w in zip(likes, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, source, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights = inputs
    *weights, ctx.act, ctx.gate, _, ctx.backend = weights
    kept = _normed.kept(x, source, norm_weight, norm_bias)
    ctx.save_for_backward(*kept, *weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    *tensors, z = ctx.saved_tensors
    x, norm_weight, norm_bias, *weights = tensors
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:10])
    wanted = [t is not None and w for t, w in zip((x, *weights), needed, strict=True)]
    found = _BACKWARD_OP(
        grad, x, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights, z, ctx.act, ctx.gate, wanted,
        ctx.backend,
    )  # fmt: skip
    dx, *dweights = (g if w else None for g, w in zip(found, wanted, strict=True))
    return dx, *(None,) * 5, *dweights, *(None,) * 4


_BACKWARD_OP = define(
    "mlp_backward",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind,"
    " Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor z, str act, str gate,"
    " bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "mlp",
    f"(Tensor x, {_normed.SCHEMA}, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, str act, str gate, bool save, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
