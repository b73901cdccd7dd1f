"""The public `linear_act`: meaning and checks; registration of `vitfast::linear_act`."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import gemm, recompute
from vitfast.ops.common.recompute import Normed
from vitfast.ops.linear_act import native, reference, vendor
from vitfast.ops.linear_act.autograd import Recorded, with_norm
from vitfast.ops.linear_act.reference import ACTIVATIONS, INPUTS, BackwardCall, Call
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad
from vitfast.runtime.triton_backend import lazy

GATES = ("first", "last")


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    *,
    gate: str | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    normed: Normed | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Linear layer and activation in one pass; the pre-activation is stored for training only.

    Covers fc1 of timm's `Mlp`, `GluMlp`, `SwiGLUPacked` (packed gate) and `SwiGLU` (two weights),
    and with act="none" any `nn.Linear`. Source of the gated forms: Shazeer 2020, "GLU Variants
    Improve Transformer".

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides.
        weight: [N, K], or that of a 1x1 convolution, [N, K, 1, 1]; x's dtype, or any below
            float64 under autocast. With `gate`, [2N, K]: both halves.
        bias: [N] ([2N] with `gate`).
        act: "none", "relu", "gelu" (erf), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)),
            "silu" or "sigmoid".
        gate: for a packed weight: "first" gives act(z1) * z2, "last" gives z1 * act(z2), where z1
            and z2 are the halves of x W^T + b (timm `GluMlp` with gate_last False or True).
        gate_weight, gate_bias: [N, K] and [N]: act(x gate_weight^T + gate_bias) * (x W^T + b).
        normed: given where x is the norm of a tensor that is kept anyway (source, weight, bias,
            eps, "layer" or "rms"): x is then computed again in the backward instead of saved. It
            changes no result; gradients still flow to x.
        backend: "auto", or a name that then must be able to run.

    Returns:
        [..., N], contiguous, x's dtype (that of autocast where it is on). Products are summed in
        float32 at least.

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError, DeviceError: bad arguments.
        BackendUnavailableError: the backend asked for cannot run.
        NotTwiceDifferentiableError: a gradient of a gradient was asked for.
    """
    tensors = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
    }
    for name, t in tensors.items():
        if t is not None or name in ("x", "weight"):
            checks.check_tensor("linear_act", name, t)
    _check_options(act, gate, gate_weight, gate_bias)
    _check_shapes(x, weight, bias, gate, gate_weight, gate_bias)
    recompute.check("linear_act", x, normed)
    checks.check_same_device("linear_act", **tensors)
    lower = autocast_dtype(x.device)
    if lower is not None and x.dtype != torch.float64:
        # Weights are rounded where they are packed, and their gradients never are.
        x = x.to(lower)
    if lower is None or x.dtype == torch.float64:
        checks.check_same_dtype("linear_act", **tensors)
    save = needs_grad(x, weight, bias, gate_weight, gate_bias)
    call = Call.of(
        x, weight, bias, act, gate or "",
        gate_weight=gate_weight, gate_bias=gate_bias, save_z=save,
    )  # fmt: skip
    return _OP(*with_norm(call, normed), backend)[0]


def _check_options(
    act: str,
    gate: str | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> None:
    if act not in ACTIVATIONS:
        raise InputValueError(
            f"linear_act: act is {act!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if gate is not None and gate not in GATES:
        raise InputValueError(f"linear_act: gate is {gate!r}, expected None, 'first' or 'last'")
    if gate is not None and gate_weight is not None:
        raise InputValueError(
            f"linear_act: gate={gate!r} is for a packed weight, but gate_weight is given too"
        )
    if gate_bias is not None and gate_weight is None:
        raise InputValueError("linear_act: gate_bias is given without a gate_weight")


def _check_shapes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: str | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> None:
    if x.ndim == 0:
        raise InputValueError("linear_act: x must have at least one dimension, got a scalar")
    if not (weight.ndim == 2 or (weight.ndim == 4 and weight.shape[2:] == (1, 1))):
        raise InputValueError(
            f"linear_act: weight has shape {tuple(weight.shape)}, expected [N, K] or [N, K, 1, 1]"
        )
    n, k = weight.shape[:2]
    if x.shape[-1] != k:
        raise InputValueError(
            f"linear_act: x has {x.shape[-1]} channels in shape {tuple(x.shape)}, "
            f"but weight takes {k} in shape {tuple(weight.shape)}"
        )
    if gate is not None and n % 2:
        raise InputValueError(
            f"linear_act: gate={gate!r} needs an even number of weight rows, got {n}"
        )
    checks.check_shape("linear_act", "bias", bias, (n,))
    if gate_weight is not None:
        checks.check_shape("linear_act", "gate_weight", gate_weight, tuple(weight.shape))
        checks.check_shape("linear_act", "gate_bias", gate_bias, (n,))


def _triton_reasons(call: Call) -> list[str]:
    why = triton.reasons(*(getattr(call, name) for name in INPUTS), dots=True)
    if call.weight.shape[1] == 0:
        why.append("there are no input channels to sum over")
    return why


def backend_key(call: Call) -> dict[str, int | str]:
    """What it depends on whether Triton's kernel or the vendor's product and a pass is faster."""
    n, k = call.weight.shape[0], call.weight[0].numel()
    return {
        "dtype": str(call.x.dtype).removeprefix("torch."),
        "pass": "train" if call.save_z else "infer",
        "act": call.act,
        "gate": call.gate,
        "m": call.x.numel() // max(k, 1),
        "n": n,
        "k": k,
    }


# The native kernel knows no tiles (AMX); oneDNN does.
_COMPILED = [native.BACKEND, vendor.BACKEND][:: -1 if gemm.HAS_TILES else 1]
DISPATCHER = Dispatcher(
    "linear_act",
    [
        *_COMPILED,
        lazy("vitfast.ops.linear_act.triton", _triton_reasons, key=backend_key),
        Backend("reference", reference.forward, lambda call: [], reference.backward),
    ],
)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = args
    call = Call(*fields)
    chosen = DISPATCHER.pick(backend, call, needs_backward=call.save_z)
    return chosen.forward(call)


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(*args[:-1])
    lead, width = call.x.shape[:-1], call.saved_width if call.save_z else None
    return (
        call.x.new_empty((*lead, call.width)),
        call.x.new_empty(0 if width is None else (*lead, width)),
    )


_RECORDED = Recorded(DISPATCHER, Call, BackwardCall, INPUTS)
_BACKWARD_OP = define(
    "linear_act_backward",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind,"
    " Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor z, str act,"
    " str gate, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _RECORDED.backward,
    _RECORDED.backward_fake,
)
_OP = define(
    "linear_act",
    f"(Tensor x, {recompute.SCHEMA}, Tensor weight, Tensor? bias, Tensor? gate_weight,"
    " Tensor? gate_bias, str act, str gate, bool save_z, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_RECORDED.setup_context,
    backward=_RECORDED.autograd(_BACKWARD_OP),
)
