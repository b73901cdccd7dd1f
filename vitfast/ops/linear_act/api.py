"""The public `linear_act`: meaning and checks; registration of `vitfast::linear_act`."""

from __future__ import annotations

import torch

from vitfast.errors import InputValueError
from vitfast.ops.common import gemm, recompute
from vitfast.ops.common.autodiff import gradients
from vitfast.ops.common.recompute import Normed
from vitfast.ops.linear_act import native, reference, vendor
from vitfast.ops.linear_act.reference import ACTIVATIONS
from vitfast.runtime import checks, triton
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.library import autocast_dtype, define, needs_grad

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
    return _OP(
        x, *(normed or recompute.ABSENT), weight, bias, gate_weight, gate_bias, act, gate or "",
        save, backend,
    )[0]  # fmt: skip


def _check_options(act, gate, gate_weight, gate_bias):
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


def _check_shapes(x, weight, bias, gate, gate_weight, gate_bias):
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


def output_width(weight: torch.Tensor, gate: str) -> int:
    return weight.shape[0] // 2 if gate else weight.shape[0]


def saved_width(
    weight: torch.Tensor, gate_weight: torch.Tensor | None, act: str, gate: str
) -> int | None:
    """Width of the pre-activation that the backward needs; None where it needs none.

    Halves of a gated layer lie side by side: as in the packed weight, or gate before value.
    """
    if gate_weight is not None:
        return 2 * weight.shape[0]
    return weight.shape[0] if gate or act != "none" else None


def _reference_call(x, weight, bias, gate_weight, gate_bias, act, gate):
    return reference.linear_act(
        x, weight, bias, act, gate=gate or None, gate_weight=gate_weight, gate_bias=gate_bias
    )


def _reference_forward(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    y = _reference_call(x, weight, bias, gate_weight, gate_bias, act, gate)
    z = x.new_empty(0)
    if save_z and saved_width(weight, gate_weight, act, gate) is not None:
        z = reference.linear_act(x, weight, bias)
        if gate_weight is not None:
            z = torch.cat((reference.linear_act(x, gate_weight, gate_bias), z), -1)
    return y, z


def _reference_backward(grad, x, weight, bias, gate_weight, gate_bias, z, act, gate, wanted):
    found = gradients(
        lambda *inputs: _reference_call(*inputs, act, gate),
        (x, weight, bias, gate_weight, gate_bias),
        (grad,),
    )
    return tuple(g if w else x.new_empty(0) for g, w in zip(found, wanted, strict=True))


def _triton_reasons(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    why = triton.reasons(x, weight, bias, gate_weight, gate_bias, dots=True)
    if weight.shape[1] == 0:
        why.append("there are no input channels to sum over")
    return why


def backend_key(x, weight, bias, gate_weight, gate_bias, act, gate, save_z):
    """What it depends on whether Triton's kernel or the vendor's product and a pass is faster."""
    n, k = weight.shape[0], weight[0].numel()
    return {
        "dtype": str(x.dtype).removeprefix("torch."), "pass": "train" if save_z else "infer",
        "act": act, "gate": gate, "m": x.numel() // max(k, 1), "n": n, "k": k,
    }  # fmt: skip


# The native kernel knows no tiles (AMX); oneDNN does.
_COMPILED = [native.BACKEND, vendor.BACKEND][:: -1 if gemm.HAS_TILES else 1]
DISPATCHER = Dispatcher(
    "linear_act",
    [
        *_COMPILED,
        triton.lazy("vitfast.ops.linear_act.triton", _triton_reasons, key=backend_key),
        Backend("reference", _reference_forward, lambda *args: [], _reference_backward),
    ],
)


def _forward(
    x, source, norm_weight, norm_bias, eps, kind, weight, bias, gate_weight, gate_bias, act, gate,
    save_z, backend,
):  # fmt: skip
    args = (x, weight, bias, gate_weight, gate_bias, act, gate, save_z)
    return DISPATCHER.pick(backend, *args, needs_backward=save_z).forward(*args)


def _fake(
    x, source, norm_weight, norm_bias, eps, kind, weight, bias, gate_weight, gate_bias, act, gate,
    save_z, backend,
):  # fmt: skip
    width = saved_width(weight, gate_weight, act, gate) if save_z else None
    lead = x.shape[:-1]
    return (
        x.new_empty((*lead, output_width(weight, gate))),
        x.new_empty(0 if width is None else (*lead, width)),
    )


def reads_x(backend: Backend, wanted: bool) -> bool:
    """Whether the backward of a backend reads more of x than its shape and dtype.

    wanted: whether a weight's gradient is. The reference differentiates its own forward.
    """
    return wanted or backend.name == "reference"


def _backward(
    grad, x, norm_weight, norm_bias, eps, kind, weight, bias, gate_weight, gate_bias, z, act, gate,
    wanted, backend,
):  # fmt: skip
    like = x.new_empty(x.shape, dtype=grad.dtype) if kind else x
    args = (like, weight, bias, gate_weight, gate_bias, act, gate, True)
    found = DISPATCHER.pick(backend, *args, needs_backward=True)
    if reads_x(found, wanted[1] or wanted[3]):
        like = recompute.again(x, norm_weight, norm_bias, eps, kind, grad.dtype)
    return found.backward(grad, like, weight, bias, gate_weight, gate_bias, z, act, gate, wanted)


def _backward_fake(
    grad, x, norm_weight, norm_bias, eps, kind, weight, bias, gate_weight, gate_bias, z, act, gate,
    wanted, backend,
):  # fmt: skip
    like = grad.new_empty(x.shape)
    return tuple(
        t.new_empty(t.shape) if w and t is not None else grad.new_empty(0)
        for t, w in zip((like, weight, bias, gate_weight, gate_bias), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, source, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights = inputs
    *weights, ctx.act, ctx.gate, _, ctx.backend = weights
    kept = recompute.kept(x, source, norm_weight, norm_bias)
    ctx.save_for_backward(*kept, *weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    x, norm_weight, norm_bias, *weights, z = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:10])
    wanted = [t is not None and w for t, w in zip((x, *weights), needed, strict=True)]
    found = _BACKWARD_OP(
        grad, x, norm_weight, norm_bias, ctx.eps, ctx.kind, *weights, z, ctx.act, ctx.gate, wanted,
        ctx.backend,
    )  # fmt: skip
    dx, *dweights = (g if w else None for g, w in zip(found, wanted, strict=True))
    return dx, *(None,) * 5, *dweights, *(None,) * 4


_BACKWARD_OP = define(
    "linear_act_backward",
    "(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str kind,"
    " Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor z, str act,"
    " str gate, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = define(
    "linear_act",
    f"(Tensor x, {recompute.SCHEMA}, Tensor weight, Tensor? bias, Tensor? gate_weight,"
    " Tensor? gate_bias, str act, str gate, bool save_z, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
