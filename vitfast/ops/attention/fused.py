"""torch's fused attention kernels one by one: forward with the log-sum-exp, and backward from it.

`F.scaled_dot_product_attention` has autograd keep what its backward needs; a registered op keeps it
itself, and so has to call the kernels below it. All of them leave the natural logarithm of each
row's sum of exp(score), [B, H, Nq], so that any one's backward follows any one's forward. Without
dropout none of them draws or reads random numbers: their seeds and offsets are empty tensors here.

What holds for their bits: on the CPU they repeat. On a GPU the forwards do; the backwards add up
gradients in the order in which blocks finish, as under `F.scaled_dot_product_attention`, unless
`torch.use_deterministic_algorithms(True)` is on. Then flash and efficient take an order, and torch
does not choose cuDNN. This switch is the whole process's, and is left to its owner.

What kernels want of their arguments is taken from torch's own callers: attention.cpp and
cuda/attention_backward.cu of aten/src/ATen/native/transformers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from vitfast.ops.attention.reference import Gradients


class Problem(NamedTuple):
    """One call of a kernel.

    Args:
        q, k, v: [B, H, N, D], one dtype.
        mask: floating, added to the scaled scores, or bool, True where a key is seen; broadcastable
            to [B, H, Nq, Nk], at least two dims; or None.
        is_causal: query i sees keys j <= i only; without a mask.
        scale: factor of the scores.
        mask_grad: whether the mask's gradient is wanted.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float
    mask_grad: bool = False


def choose(problem: Problem) -> str:
    """The kernel that torch would take where this problem is differentiated.

    Returns:
        A key of `KERNELS`; "math" where no fused kernel takes the problem; "" for a device or a
        kernel that is not known here.
    """
    device = problem.q.device.type
    if device not in ("cpu", "cuda"):
        return ""
    with torch.enable_grad():  # some kernels have no backward for what their forward takes
        leaves = [t.detach().requires_grad_() for t in problem[:3]]
        mask = problem.mask
        if mask is not None:
            mask = mask.detach().requires_grad_(problem.mask_grad)
        code = torch.ops.aten._fused_sdp_choice(
            *leaves, mask, 0.0, problem.is_causal, scale=problem.scale
        )
    if code == SDPBackend.MATH.value:
        return "math"
    name = _NAMES.get((device, code), "")
    return name if name and KERNELS[name].is_known() else ""


class Kernel:
    """A fused kernel: attention with the log-sum-exp of each row, and its backward."""

    def is_known(self) -> bool:
        """Whether it is here in the form that it is called in."""
        return True

    def forward(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B, H, Nq, D], dtype of v, and the log-sum-exp [B, H, Nq], float32 or float64."""
        raise NotImplementedError

    def backward(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> Gradients:
        """Gradients from that of out, out itself [B, H, Nq, D] and the log-sum-exp [B, H, Nq]."""
        raise NotImplementedError


class _Aten(Kernel):
    """A pair of ops of aten, called by the names of their arguments."""

    def __init__(self, op: str) -> None:
        self.op = op

    @functools.cache  # noqa: B019 - there are four
    def is_known(self) -> bool:
        """Whether both ops exist and want just the arguments that they are given here."""
        one = torch.empty(1, 1, 1, 8, device="meta")
        problem = Problem(one, one, one, None, False, 1.0)
        given = self._forward_arguments(problem)
        return _wants(self.op, given) and _wants(
            f"{self.op}_backward", self._backward_arguments(one, problem, one, one[..., 0])
        )

    def forward(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _overload(self.op)(**self._forward_arguments(problem))[:2]
        shape = problem.q.shape
        return out[..., : shape[-1]], lse[:, :, : shape[2]].reshape(shape[:3])

    def backward(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> Gradients:
        found = _overload(f"{self.op}_backward")(
            **self._backward_arguments(grad, problem, out, lse)
        )
        width = problem.q.shape[-1]
        dq, dk, dv = (t[..., :width] for t in found[:3])
        return dq, dk, dv, found[3] if len(found) > 3 else None

    def _forward_arguments(self, problem: Problem) -> dict[str, Any]:
        return {
            "query": problem.q, "key": problem.k, "value": problem.v, "dropout_p": 0.0,
            "is_causal": problem.is_causal, "scale": problem.scale,
        }  # fmt: skip

    def _backward_arguments(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> dict[str, Any]:
        return {
            "grad_out": grad, "query": problem.q, "key": problem.k, "value": problem.v,
            "out": out, "logsumexp": lse, "dropout_p": 0.0, "is_causal": problem.is_causal,
            "scale": problem.scale,
        }  # fmt: skip


class _OnCpu(_Aten):
    def _forward_arguments(self, problem: Problem) -> dict[str, Any]:
        return super()._forward_arguments(problem) | {"attn_mask": _added(problem)}

    def _backward_arguments(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> dict[str, Any]:
        given = super()._backward_arguments(grad, problem, out, lse)
        return given | {"attn_mask": _added(problem)}


class _Flash(_Aten):
    """Takes head dims that are multiples of 8, and no mask."""

    def _forward_arguments(self, problem: Problem) -> dict[str, Any]:
        q, k, v = (_in_eights(t) for t in problem[:3])
        return super()._forward_arguments(problem._replace(q=q, k=k, v=v))

    def _backward_arguments(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> dict[str, Any]:
        q, k, v, grad, out = (_in_eights(t) for t in (*problem[:3], grad, out))
        problem = problem._replace(q=q, k=k, v=v)
        given = super()._backward_arguments(grad, problem, out, lse)
        if torch.version.hip:
            seeds = _unread_seeds(q)
        else:
            seeds = {
                "philox_seed": q.new_empty(2, dtype=torch.uint64),
                "philox_offset": q.new_empty((), dtype=torch.uint64),
            }
        return given | _lengths(problem) | seeds


class _Cudnn(_Aten):
    def _forward_arguments(self, problem: Problem) -> dict[str, Any]:
        given = super()._forward_arguments(problem)
        return given | {"attn_bias": problem.mask, "compute_log_sumexp": True}

    def _backward_arguments(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> dict[str, Any]:
        lse = lse.contiguous().view(*lse.shape, *(1,) * (self._lse_dims() - lse.ndim))
        given = super()._backward_arguments(grad, problem, out, lse)
        given["attn_bias"] = problem.mask
        return given | _lengths(problem) | _unread_seeds(problem.q)

    @functools.cache  # noqa: B019 - there is one
    def _lse_dims(self) -> int:
        """Of its log-sum-exp: [B, H, Nq, 1], or without the last, which torch changed."""
        one = torch.empty(1, 1, 1, 8, device="meta", dtype=torch.bfloat16)
        given = self._forward_arguments(Problem(one, one, one, None, False, 1.0))
        return _overload(self.op)(**given)[1].ndim


class _Efficient(_Aten):
    """Takes a mask of q's dtype for every pair, rows apart by multiples of 8 numbers."""

    def _forward_arguments(self, problem: Problem) -> dict[str, Any]:
        given = super()._forward_arguments(problem)
        return given | {"attn_bias": _of_every_pair(problem), "compute_log_sumexp": True}

    def _backward_arguments(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> dict[str, Any]:
        if not torch.version.hip:  # reads rows by 32; exp(score - inf) is 0 in those beyond
            lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        given = super()._backward_arguments(grad, problem, out, lse.contiguous())
        given["grad_out_"] = given.pop("grad_out")
        given["attn_bias"] = _of_every_pair(problem)
        given["grad_input_mask"] = [True, True, True, problem.mask_grad]
        return given | _unread_seeds(problem.q)


class _Xformers(Kernel):
    """xformers' memory-efficient attention, which takes [B, N, H, D]."""

    def forward(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        xformers = importlib.import_module("xformers.ops")
        q, k, v = (t.transpose(1, 2) for t in problem[:3])
        out, lse = xformers.memory_efficient_attention_forward_requires_grad(
            q, k, v, scale=problem.scale
        )
        return out.transpose(1, 2), lse[..., : q.shape[1]]  # some of its kernels fill rows up

    def backward(
        self, grad: torch.Tensor, problem: Problem, out: torch.Tensor, lse: torch.Tensor
    ) -> Gradients:
        xformers = importlib.import_module("xformers.ops")
        grad, out, q, k, v = (t.transpose(1, 2) for t in (grad, out, *problem[:3]))
        found = xformers.memory_efficient_attention_backward(
            grad, out, lse.contiguous(), q, k, v, scale=problem.scale
        )
        dq, dk, dv = (t.transpose(1, 2) for t in found)
        return dq, dk, dv, None


KERNELS: dict[str, Kernel] = {
    "cpu": _OnCpu("_scaled_dot_product_flash_attention_for_cpu"),
    "flash": _Flash("_scaled_dot_product_flash_attention"),
    "efficient": _Efficient("_scaled_dot_product_efficient_attention"),
    "cudnn": _Cudnn("_scaled_dot_product_cudnn_attention"),
    "xformers": _Xformers(),
}
_NAMES = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): "cpu",
    ("cuda", SDPBackend.FLASH_ATTENTION.value): "flash",
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): "efficient",
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): "cudnn",
}


def _overload(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.aten, op).default


def _wants(op: str, given: dict[str, Any]) -> bool:
    """Whether an op of aten has all arguments that it is given, and no other without a default."""
    if not hasattr(torch.ops.aten, op):
        return False
    arguments = getattr(torch.ops.aten, op).default._schema.arguments
    needed = {a.name for a in arguments if not a.has_default_value()}
    return needed <= given.keys() <= {a.name for a in arguments}


def _in_eights(t: torch.Tensor) -> torch.Tensor:
    """t with zeros up to a last dim that is a multiple of 8."""
    return F.pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t


def _lengths(problem: Problem) -> dict[str, Any]:
    """The lengths of equally long sequences."""
    queries, keys = problem.q.shape[2], problem.k.shape[2]
    return {"cum_seq_q": None, "cum_seq_k": None, "max_q": queries, "max_k": keys}


def _unread_seeds(q: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a kernel without dropout takes and does not read."""
    seed = q.new_empty((), dtype=torch.int64)
    return {"philox_seed": seed, "philox_offset": seed}


def _added(problem: Problem) -> torch.Tensor | None:
    """The mask as a term of the scores: -inf instead of False."""
    mask = problem.mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    term = torch.zeros_like(mask, dtype=problem.q.dtype)
    return term.masked_fill_(~mask, float("-inf"))


def _of_every_pair(problem: Problem) -> torch.Tensor | None:
    """The mask [B, H, Nq, Nk], expanded, with strides that the efficient kernel can load by."""
    mask = _added(problem)
    if mask is None:
        return None
    if mask.stride(-1) != 1 or any(s % 8 for s in mask.stride()[:-1]):
        mask = F.pad(mask, (0, 8 - mask.shape[-1] % 8))[..., : mask.shape[-1]]
    return mask.expand(*problem.q.shape[:3], problem.k.shape[2])
