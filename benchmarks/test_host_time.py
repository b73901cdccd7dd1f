"""What a swapped ViT block and its ops take in Python, on a Triton driver that launches nothing."""

from __future__ import annotations

import time

import pytest
import timm
import torch

import vitfast
from vitfast import ops

pytest.importorskip("triton")
from vitfast.testing.no_launch import launching_nothing  # noqa: E402

CALLS = {
    "block": lambda b, x, qkv: b(x),
    "plan": lambda b, x, qkv: b._recall_plan(x, None),
    "layer_norm": lambda b, x, qkv: ops.layer_norm(x, b.norm1.weight, b.norm1.bias),
    "linear_act": lambda b, x, qkv: ops.linear_act(x, b.attn.qkv.weight, b.attn.qkv.bias),
    "attention": lambda b, x, qkv: ops.attention(qkv),
    "add_norm": lambda b, x, qkv: ops.add_norm(
        x, x, b.norm2.weight, b.norm2.bias, gamma=b.ls1.gamma
    ),
    "mlp": lambda b, x, qkv: ops.mlp(
        x, b.mlp.fc1.weight, b.mlp.fc1.bias, b.mlp.fc2.weight, b.mlp.fc2.bias
    ),
    "residual_add": lambda b, x, qkv: ops.residual_add(x, x, gamma=b.ls2.gamma),
    "torch.add, to compare": lambda b, x, qkv: torch.add(x, x),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.benchmark(timer=time.thread_time, group="host time")
def test_host_time(benchmark, what: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, init_values=1e-5)
    block = model.eval().half().blocks[0]
    vitfast.swap(block)
    x, qkv = torch.zeros(1, 17, 192).half(), torch.zeros(1, 17, 3, 3, 64).half()
    before, vitfast.settings.backend = vitfast.settings.backend, "triton"
    try:
        with launching_nothing(keep=False), torch.inference_mode():
            benchmark.pedantic(
                CALLS[what], args=(block, x, qkv), rounds=40, iterations=50, warmup_rounds=2
            )
    finally:
        vitfast.settings.backend = before
