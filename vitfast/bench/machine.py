"""This machine: what it is, and its measured ceilings, with which a kernel's time is compared.

Two numbers a dtype: the fastest matrix product and the fastest copy that a vendor's library reaches
here, today, with the threads that torch uses. They are measured once a process, in about a second.
The floor of a case is the time below which no kernel can do its work under these ceilings.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

import vitfast
from vitfast.bench import peers
from vitfast.bench.record import Row
from vitfast.bench.timer import stopwatch
from vitfast.ops.spec import Cost
from vitfast.runtime import device as facts
from vitfast.runtime import native
from vitfast.runtime.commit import commit
from vitfast.runtime.launches import arch_of

GEMM_SHAPES = ((2048, 2048, 2048), (4096, 768, 3072), (4096, 3072, 768))
"""(M, K, N): a square one, and the two products of a ViT-B MLP at 4096 tokens."""
CUDA_GEMM_SHAPES = ((8192, 8192, 8192),)
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Tensors that are copied: well past the caches."""
SECONDS_PER_CASE = 0.3
"""Time for one matrix product or copy, beyond its first two calls."""


def gemm_gflops(device: str, dtype: torch.dtype) -> float:
    """The fastest matrix product seen here, in GFLOP/s."""
    return _gemm_gflops(device, dtype, torch.get_num_threads())


def copy_gbs(device: str) -> float:
    """The fastest copy of a large tensor seen here, bytes read plus bytes written, in GB/s."""
    return _copy_gbs(device, torch.get_num_threads())


def floor_seconds(cost: Cost, device: str, dtype: torch.dtype) -> float:
    """The floor: the longer of the time for the operations and the time for the bytes."""
    return max(
        cost.flops / (gemm_gflops(device, dtype) * 1e9), cost.bytes / (copy_gbs(device) * 1e9)
    )


def rate(row: Row, cost: Cost, device: str, dtype: torch.dtype) -> None:
    """Fill in the rates of every contender, and the share of the floor in its time.

    The row's own rate is vitfast's, in the unit of the ceiling that binds.
    """
    floor = floor_seconds(cost, device, dtype)
    for result in row.results.values():
        if result.median_ms:
            seconds = result.median_ms / 1e3
            result.gflops = cost.flops / seconds / 1e9
            result.gbs = cost.bytes / seconds / 1e9
            result.floor_share = floor / seconds
    ours = row.results["vitfast"]
    computing = cost.flops / gemm_gflops(device, dtype) >= cost.bytes / copy_gbs(device)
    row.rate, row.unit = (ours.gflops, "GFLOP/s") if computing else (ours.gbs, "GB/s")
    row.floor_share = ours.floor_share


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine block of a record: hardware, versions, instruction set, commit."""
    why = native.reasons()
    return {
        **facts.machine(),
        "device": device,
        "arch": arch_of(torch.device(device)).name if device.startswith("cuda") else None,
        "name": device_name(device),
        "isa": None if why else native.isa(),
        "native": why[0] if why else "built",
        "versions": {**facts.versions(), **peers.versions(), "vitfast": vitfast.__version__},
        "commit": commit(),
    }


def device_name(device: str = "cpu") -> str:
    """As in a table's title: the GPU's name, or the CPU's with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{facts.cpu_model()}, {torch.get_num_threads()} threads"


def floors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The ceilings as a record keeps them, under the name "floors"."""
    return {"gflops": gemm_gflops(device, dtype), "gbs": copy_gbs(device)}


def _best(call: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest call: a ceiling is a best case, not a median."""
    watch = stopwatch(device)
    call()
    best = watch(call, 1)[0]
    end = time.perf_counter() + SECONDS_PER_CASE
    while time.perf_counter() < end:
        best = min(best, watch(call, 1)[0])
    return best


@functools.cache
def _gemm_gflops(device: str, dtype: torch.dtype, threads: int) -> float:
    """`gemm_gflops`, kept for each number of threads."""
    best = 0.0
    shapes = CUDA_GEMM_SHAPES if device.startswith("cuda") else GEMM_SHAPES
    for m, k, n in shapes:
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        for call in _products(x, weight):
            best = max(best, 2.0 * m * k * n / _best(call, device) / 1e9)
    return best


def _products(x: torch.Tensor, weight: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Ways to x @ weight.T: torch's own, and oneDNN with a prepacked weight where it has one."""
    calls = [lambda: torch.mm(x, weight.t())]
    if x.device.type == "cpu":
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        except (AttributeError, RuntimeError):
            return calls  # a torch without oneDNN, or a dtype that it lacks on this CPU
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return calls


@functools.cache
def _copy_gbs(device: str, threads: int) -> float:
    """`copy_gbs`, kept for each number of threads."""
    source = torch.ones(COPY_BYTES[device.split(":")[0]], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _best(lambda: target.copy_(source), device) / 1e9
