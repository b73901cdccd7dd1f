"""The public `mlp`: meaning and checks; registration of `vitfast::mlp`.

A chain of two linear layers saves the pre-activation and the activation, 4C wide each. Here the
activation is computed again in the backward, and the norm before the MLP too where it is named:
of a ViT block's 18 saved units under bfloat16 autocast (a unit is B N C elements of 2 bytes) 13
remain. Its backends are those of `linear_act`, which does the work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import recompute
from vitfast.ops.common.recompute import Normed
from vitfast.ops.grn.api import DISPATCHER as GRN
from vitfast.ops.grn.reference import Call as GrnCall
from vitfast.ops.linear_act import api as linear
from vitfast.ops.linear_act import native
from vitfast.ops.linear_act.autograd import Recorded, with_norm
from vitfast.ops.linear_act.reference import ACTIVATIONS, activate_packed, output_width
from vitfast.ops.linear_act.reference import BackwardCall as LinearBackward
from vitfast.ops.mlp.reference import INPUTS, BackwardCall, Call
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
    _check_options(act, gate)
    _check_shapes(x, weight1, bias1, weight2, bias2, gate)
    recompute.check("mlp", x, normed)
    grn_weight, grn_bias, grn_eps = grn or (None, None, 0.0)
    if grn is not None:
        _check_grn(x, weight2, grn)
    checks.check_same_device("mlp", **tensors, grn_weight=grn_weight, grn_bias=grn_bias)
    lower = autocast_dtype(x.device)
    if lower is not None and x.dtype != torch.float64:
        x = x.to(lower)
    else:
        checks.check_same_dtype("mlp", **tensors)
    save = needs_grad(x, weight1, bias1, weight2, bias2, grn_weight, grn_bias)
    call = Call(
        x, None, None, None, 1e-6, "", weight1, bias1, weight2, bias2, grn_weight, grn_bias, act,
        gate or "", save, grn_eps,
    )  # fmt: skip
    return _OP(*with_norm(call, normed), backend)[0]


def _check_grn(x: torch.Tensor, weight2: torch.Tensor, grn: Grn) -> None:
    weight, bias, eps = grn
    if x.ndim not in (3, 4):
        raise InputValueError(
            f"mlp: with grn x must be [B, H, W, K] or [B, N, K], got shape {tuple(x.shape)}"
        )
    for name, t in (("grn's weight", weight), ("grn's bias", bias)):
        checks.check_tensor("mlp", name, t)
        checks.check_shape("mlp", name, t, (weight2.shape[1],))
    checks.check_eps("mlp", eps)


def _check_options(act: str, gate: str | None) -> None:
    if act not in ACTIVATIONS:
        raise InputValueError(f"mlp: act is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    if gate is not None and gate not in linear.GATES:
        raise InputValueError(f"mlp: gate is {gate!r}, expected None, 'first' or 'last'")


def _check_shapes(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    gate: str | None,
) -> None:
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
    hidden = output_width(weight1, gate or "")
    if weight2.shape[1] != hidden:
        raise InputValueError(
            f"mlp: weight2 has shape {tuple(weight2.shape)}, but fc1 gives {hidden} channels"
        )
    checks.check_shape("mlp", "bias1", bias1, (weight1.shape[0],))
    checks.check_shape("mlp", "bias2", bias2, (weight2.shape[0],))


def _on(backend: Backend) -> Backend:
    """Both layers on one backend of `linear_act`."""
    return Backend(
        backend.name,
        partial(_forward_on, backend),
        partial(_reasons_of, backend),
        partial(_backward_on, backend),
        backend.available,
        lambda call, *, train: backend.unproven(call.first, train=train),
        backend.withdraw and partial(_withdraw, backend),
    )


def _withdraw(backend: Backend, error: BaseException, call: Call, *, train: bool) -> bool:
    assert backend.withdraw is not None  # who has none is not asked
    return backend.withdraw(error, call.first, train=train)


def _reasons_of(backend: Backend, call: Call) -> list[str]:
    # The second layer's input is not there yet; its own weight stands for its width.
    return backend.can_run(call.first) or backend.can_run(call.second(call.weight2.flatten(1)))


def _forward_on(backend: Backend, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, z = backend.forward(call.first)
    if not call.save:
        z = call.x.new_empty(0)
    elif call.act == "none" and not call.gate:
        z = hidden
    if call.grn_weight is not None:
        hidden = _respond(backend, hidden, call)[1]
    y, _ = backend.forward(call.second(hidden))
    return y, z


def _grn_call(hidden: torch.Tensor, call: Call | BackwardCall) -> GrnCall:
    assert call.grn_weight is not None and call.grn_bias is not None  # nobody else asks
    return GrnCall(hidden, call.grn_weight, call.grn_bias, call.grn_eps, hidden.dtype)


def _respond(
    backend: Backend, hidden: torch.Tensor, call: Call | BackwardCall
) -> tuple[Backend, torch.Tensor, torch.Tensor]:
    """The backend of the global response norm, its result, and what its backward needs."""
    given = _grn_call(hidden, call)
    found = GRN.backends.get(backend.name)
    if found is None or found.can_run(given):
        found = GRN.pick("auto", given, needs_backward=True)
    return found, *found.forward(given)


def _respond_backward(
    norm: Backend, grad: torch.Tensor, hidden: torch.Tensor, call: BackwardCall, norms: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden and of the global response norm's weight and bias."""
    assert norm.backward is not None  # `_respond` asked for one
    return norm.backward(grad, _grn_call(hidden, call), norms)


def _backward_on(backend: Backend, call: BackwardCall) -> tuple[torch.Tensor, ...]:
    assert backend.backward is not None  # the dispatcher was asked for one
    z, wanted, empty = call.z, call.wanted, call.x.new_empty(0)
    has_grn = call.grn_weight is not None
    identity = call.act == "none" and not call.gate
    if identity:
        hidden = z
    elif wanted[3] or has_grn:
        hidden = _hidden(backend, z, call.act, call.gate)
    else:  # of a frozen fc2 only the shape
        hidden = z.new_empty((*z.shape[:-1], call.weight2.shape[1]))
    operand = hidden
    first = [wanted[0], wanted[1], wanted[2], False, False]
    before = any(first) or any(wanted[5:])
    second = [before, wanted[3], wanted[4], False, False]
    dgrn = [call.x.new_empty(0), call.x.new_empty(0)]
    if has_grn:
        norm, operand, norms = _respond(backend, hidden, call)
    # Records are made where they are passed on: one that is kept would keep its tensors.
    dhidden, dw2, db2, _, _ = backend.backward(
        LinearBackward.of(call.grad, call.forward_call.second(operand), empty, second)
    )
    if not before:
        return empty, empty, empty, dw2, db2, *dgrn
    if has_grn:
        dhidden, *found = _respond_backward(norm, dhidden, hidden, call, norms)
        dgrn = [g if w else call.x.new_empty(0) for g, w in zip(found, wanted[5:], strict=True)]
    if not any(first):
        return empty, empty, empty, dw2, db2, *dgrn
    del hidden, operand
    z = empty if identity else z
    dx, dw1, db1, _, _ = backend.backward(
        LinearBackward.of(dhidden, call.forward_call.first, z, first)
    )
    return dx, dw1, db1, dw2, db2, *dgrn


def _hidden(backend: Backend, z: torch.Tensor, act: str, gate: str) -> torch.Tensor:
    """The activation, from the pre-activation."""
    if backend is native.BACKEND:
        return native.activation(z, act, gate)
    return activate_packed(z, act, gate) if gate else ACTIVATIONS[act](z)


DISPATCHER = Dispatcher("mlp", [_on(b) for b in linear.DISPATCHER.backends.values()])


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = args
    call = Call(*fields)
    return DISPATCHER.pick(backend, call, needs_backward=call.save).forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    lead = call.x.shape[:-1]
    y = call.x.new_empty((*lead, call.weight2.shape[0]))
    return y, call.x.new_empty((*lead, call.weight1.shape[0]) if call.save else 0)


_RECORDED = Recorded(DISPATCHER, Call, BackwardCall, INPUTS)
_BACKWARD_OP = define(
    "mlp_backward",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind,"
    " Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? grn_weight,"
    " Tensor? grn_bias, Tensor z, str act, str gate, float grn_eps, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _RECORDED.backward,
    _RECORDED.backward_fake,
)
_OP = define(
    "mlp",
    f"(Tensor x, {recompute.SCHEMA}, Tensor weight1, Tensor? bias1, Tensor weight2,"
    " Tensor? bias2, Tensor? grn_weight, Tensor? grn_bias, str act, str gate, bool save,"
    " float grn_eps, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_RECORDED.setup_context,
    backward=_RECORDED.autograd(_BACKWARD_OP),
)
