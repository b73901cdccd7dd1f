"""The public `mlp`: meaning and checks; registration of `vitfast::mlp`.

A chain of two linear layers saves the pre-activation and the activation, 4C wide each. Here the
activation is computed again in the backward, and the norm before the MLP too where it is named:
of a ViT block's 18 saved units under bfloat16 autocast (a unit is B N C elements of 2 bytes) 13
remain. Its backends are those of `linear_act`, which does the work.
"""

from __future__ import annotations

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import recompute
from vitfast.ops.common.recompute import Normed
from vitfast.ops.grn.api import DISPATCHER as GRN
from vitfast.ops.grn.reference import Call as GrnCall
from vitfast.ops.linear_act import api as linear
from vitfast.ops.linear_act import native
from vitfast.ops.linear_act.reference import ACTIVATIONS, activate
from vitfast.runtime import checks
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad

Grn = tuple[torch.Tensor, torch.Tensor, float]


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
    grn: Grn | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """fc2(act(fc1(x))) (timm `Mlp`, `GluMlp`, `SwiGLUPacked`, `GlobalResponseNormMlp`).

    What training needs is saved once.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides.
        weight1, bias1: [N, K] and [N]; with `gate`, [2N, K] and [2N]: both halves.
        weight2, bias2: [M, N] and [M].
        act, gate: as for `linear_act`.
        normed: given where x is the norm of a tensor that is kept anyway (source, weight, bias,
            eps, "layer" or "rms"): x is then computed again instead of saved. It changes no
            result; gradients still flow to x.
        grn: weight [N], bias [N] and eps of the `grn` between act and fc2, over x's positions: x is
            then [B, H, W, K] or [B, N', K]. weight and bias may have another floating dtype.
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
    grn_weight, grn_bias, grn_eps = grn or (None, None, 0.0)
    if grn is not None:
        _check_grn(x, weight2, grn_weight, grn_bias, grn_eps)
    checks.check_same_device("mlp", **tensors, grn_weight=grn_weight, grn_bias=grn_bias)
    lower = autocast_dtype(x.device)
    if lower is not None and x.dtype != torch.float64:
        x = x.to(lower)
    else:
        checks.check_same_dtype("mlp", **tensors)
    save = needs_grad(x, weight1, bias1, weight2, bias2, grn_weight, grn_bias)
    return _OP(
        x, *(normed or recompute.ABSENT), weight1, bias1, weight2, bias2, grn_weight, grn_bias,
        act, gate or "", save, grn_eps, backend,
    )[0]  # fmt: skip


def _check_grn(x, weight2, weight, bias, eps):
    if x.ndim not in (3, 4):
        raise InputValueError(
            f"mlp: with grn x must be [B, H, W, K] or [B, N, K], got shape {tuple(x.shape)}"
        )
    for name, t in (("grn's weight", weight), ("grn's bias", bias)):
        checks.check_tensor("mlp", name, t)
        checks.check_shape("mlp", name, t, (weight2.shape[1],))
    checks.check_eps("mlp", eps)


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
    recompute.check("mlp", x, normed)


def _on(backend: Backend) -> Backend:
    """Both layers on one backend of `linear_act`."""

    def respond(hidden, grn):
        """The global response norm, and what its backward needs."""
        call = GrnCall(hidden, *grn, hidden.dtype)
        name = backend.name if backend.name in GRN.backends else "auto"
        found = GRN.backends.get(name)
        if found is None or found.can_run(call):
            found = GRN.pick("auto", call, needs_backward=True)
        return found, *found.forward(call)

    def can_run(x, weight1, bias1, weight2, bias2, act, gate, save, *grn):
        why = backend.can_run(x, weight1, bias1, None, None, act, gate, save)
        # The second layer's input is not there yet; its own weight stands for its width.
        return why or backend.can_run(
            weight2.flatten(1), weight2, bias2, None, None, "none", "", save
        )

    def forward(x, weight1, bias1, weight2, bias2, act, gate, save, *grn):
        hidden, z = backend.forward(x, weight1, bias1, None, None, act, gate, save)
        if not save:
            z = None
        elif act == "none" and not gate:
            z = hidden
        if grn[0] is not None:
            _, hidden, _ = respond(hidden, grn)
        y, _ = backend.forward(hidden, weight2, bias2, None, None, "none", "", False)
        return y, x.new_empty(0) if z is None else z

    def backward(grad, x, weight1, bias1, weight2, bias2, z, act, gate, wanted, *grn):
        identity = act == "none" and not gate
        if identity:
            hidden = z
        elif wanted[3] or grn[0] is not None:
            hidden = _hidden(backend, z, act, gate)
        else:  # of a frozen fc2 only the shape
            hidden = z.new_empty((*z.shape[:-1], weight2.shape[1]))
        operand = hidden
        first = [wanted[0], wanted[1], wanted[2], False, False]
        before = any(first) or any(wanted[5:])
        second = [before, wanted[3], wanted[4], False, False]
        empty = x.new_empty(0)
        dgrn = [x.new_empty(0), x.new_empty(0)]
        if grn[0] is not None:
            norm, operand, norms = respond(hidden, grn)
        dhidden, dw2, db2, _, _ = backend.backward(
            grad, operand, weight2, bias2, None, None, empty, "none", "", second
        )
        if not before:
            return empty, empty, empty, dw2, db2, *dgrn
        if grn[0] is not None:
            call = GrnCall(hidden, *grn, hidden.dtype)
            dhidden, *found = norm.backward(dhidden, call, norms)
            dgrn = [g if w else x.new_empty(0) for g, w in zip(found, wanted[5:], strict=True)]
        if not any(first):
            return empty, empty, empty, dw2, db2, *dgrn
        del hidden, operand
        dx, dw1, db1, _, _ = backend.backward(
            dhidden, x, weight1, bias1, None, None, empty if identity else z, act, gate, first
        )
        return dx, dw1, db1, dw2, db2, *dgrn

    def unproven(x, weight1, bias1, weight2, bias2, act, gate, save, *grn):
        return backend.unproven(x, weight1, bias1, None, None, act, gate, save)

    return Backend(backend.name, forward, can_run, backward, backend.available, unproven)


def _hidden(backend: Backend, z: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """The activation, from the pre-activation."""
    if backend is native.BACKEND:
        return native.activation(z, act, gate)
    return activate(*z.chunk(2, -1), act, gate) if gate else ACTIVATIONS[act](z)


DISPATCHER = Dispatcher("mlp", [_on(b) for b in linear.DISPATCHER.backends.values()])


def _forward(
    x, source, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, grn_weight,
    grn_bias, act, gate, save, grn_eps, backend,
):  # fmt: skip
    args = (x, weight1, bias1, weight2, bias2, act, gate, save, grn_weight, grn_bias, grn_eps)
    return DISPATCHER.pick(backend, *args, needs_backward=save).forward(*args)


def _fake(
    x, source, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, grn_weight,
    grn_bias, act, gate, save, grn_eps, backend,
):  # fmt: skip
    lead = x.shape[:-1]
    y = x.new_empty((*lead, weight2.shape[0]))
    return y, x.new_empty((*lead, weight1.shape[0]) if save else 0)


def _backward(
    grad, x, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, grn_weight,
    grn_bias, z, act, gate, grn_eps, wanted, backend,
):  # fmt: skip
    grn = (grn_weight, grn_bias, grn_eps)
    like = x.new_empty(x.shape, dtype=z.dtype) if kind else x
    args = (like, weight1, bias1, weight2, bias2, act, gate, True, *grn)
    found = DISPATCHER.pick(backend, *args, needs_backward=True)
    if linear.reads_x(found, wanted[1]):
        like = recompute.again(x, norm_weight, norm_bias, eps, kind, z.dtype)
    return found.backward(grad, like, weight1, bias1, weight2, bias2, z, act, gate, wanted, *grn)


def _backward_fake(
    grad, x, norm_weight, norm_bias, eps, kind, weight1, bias1, weight2, bias2, grn_weight,
    grn_bias, z, act, gate, grn_eps, wanted, backend,
):  # fmt: skip
    likes = (z.new_empty(x.shape), weight1, bias1, weight2, bias2, grn_weight, grn_bias)
    return tuple(
        t.new_empty(t.shape) if w and t is not None else z.new_empty(0)
        for t, w in zip(likes, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, source, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights = inputs
    *weights, ctx.act, ctx.gate, _, ctx.grn_eps, ctx.backend = weights
    kept = recompute.kept(x, source, norm_weight, norm_bias)
    ctx.save_for_backward(*kept, *weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    *tensors, z = ctx.saved_tensors
    x, norm_weight, norm_bias, *weights = tensors
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:12])
    wanted = [t is not None and w for t, w in zip((x, *weights), needed, strict=True)]
    found = _BACKWARD_OP(
        grad, x, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights, z, ctx.act, ctx.gate,
        ctx.grn_eps, wanted, ctx.backend,
    )  # fmt: skip
    dx, *dweights = (g if w else None for g, w in zip(found, wanted, strict=True))
    return dx, *(None,) * 5, *dweights, *(None,) * 5


_BACKWARD_OP = define(
    "mlp_backward",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind,"
    " Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? grn_weight,"
    " Tensor? grn_bias, Tensor z, str act, str gate, float grn_eps, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "mlp",
    f"(Tensor x, {recompute.SCHEMA}, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, Tensor? grn_weight, Tensor? grn_bias, str act, str gate, bool save,"
    " float grn_eps, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
