"""What decides which kernels a call runs, besides its arguments and the model."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from vitfast.runtime.launches import edition
from vitfast.runtime.library import autocast_dtype
from vitfast.settings import settings

_precision = torch._C._get_fp32_precision_getter
_FLAGS = (
    torch.get_default_dtype, torch._C._get_cudnn_enabled, torch._C._get_deterministic_algorithms,
    torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled, torch._C._get_cudnn_sdp_enabled,
    torch._C._get_math_sdp_allow_fp16_bf16_reduction,
)  # fmt: skip
"""What `torch.backends` gives, which takes three times as long."""


def ambient(device: torch.device) -> Hashable:
    """Equal for two calls with inputs on a device that run the same kernels, as far as torch's and
    vitfast's settings, tables and trust go."""
    return (
        autocast_dtype(device),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        settings.backend,
        settings.disable,
        settings.trust,
        edition(),
        _precision("cuda", "matmul"),
        _precision("cuda", "conv"),
        *[flag() for flag in _FLAGS],
        tuple(torch._C._get_sdp_priority_order()),
    )
