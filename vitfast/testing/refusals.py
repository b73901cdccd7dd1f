"""Which backends may refuse which cases: all others must run, and may not step aside unseen.

A test that skips whatever a backend says it cannot run passes for a kernel that wrongly refuses.
What is refused on purpose is listed here instead, by case, whatever the backend itself says.
"""

from __future__ import annotations

import torch

from vitfast.runtime.triton import interpreting
from vitfast.testing.cases import Case

REFUSED = {
    ("attention", "cpu"): {"head_dim_264"},
    ("attention", "triton"): {"head_dim_264"},
    ("varlen_attention", "cpu"): {"head_dim_264"},
}
"""(op, backend) -> names of the samples beyond what its kernels were written for."""


def may_refuse(case: Case, backend: str, backward: bool = False) -> bool:
    """Whether a backend may refuse a case whose tensors are on the CPU.

    Args:
        backend: a name in the op's dispatcher, not "reference".
        backward: whether gradients are asked for.
    """
    spec = case.spec
    if spec.dispatcher.backends[backend].available():
        return True  # not on this machine, or not built
    if backend == "triton" and (not interpreting() or _has_bfloat16(case)):
        return True
    if backend == "vendor" and spec.name in ("linear_act", "mlp"):
        return _without_onednn(case)
    if backend == "vendor" and spec.name == "attention" and backward:
        mask = case.call.arguments.get("mask")  # flash's backward is wrong where one drowns scores
        return mask is not None and mask.is_floating_point()
    return case.sample.name in REFUSED.get((spec.name, backend), ())


def _has_bfloat16(case: Case) -> bool:
    """Which Triton's interpreter computes wrongly."""
    values = case.call.arguments.values()
    return torch.bfloat16 in {v.dtype if isinstance(v, torch.Tensor) else v for v in values}


def _without_onednn(case: Case) -> bool:
    """oneDNN has no products of nothing, and bfloat16 only with the instructions for it."""
    if "empty" in case.sample.tags or not torch.backends.mkldnn.enabled:
        return True
    return case.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
