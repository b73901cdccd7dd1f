"""What only a GPU can show of an op's own kernels, beyond the samples of its spec.

Each check runs one backend of an op and gives the faults that it found as sentences; an empty list
is a pass. `determinism` runs on the CPU too, so that it can be tested there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vitfast import ops
from vitfast.check.fuzz import fuzz
from vitfast.ops.spec import OpSpec, Sample, randn
from vitfast.testing.cases import Case
from vitfast.testing.errors import same_bits
from vitfast.testing.inputs import OpCall, materialise, outputs_of

REPEATS = 50
"""Calls whose results must have the same bits."""
FUZZ_SECONDS = 8.0
"""Time for the random problems of one backend."""
BEYOND_ROWS = 2**21 + 128
"""Rows of 1024 elements: together just more than 2^31 elements."""


def determinism(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str, device: str,
    repeats: int = REPEATS,
) -> list[str]:  # fmt: skip
    """Outputs and gradients have the same bits in every one of `repeats` calls."""
    case = Case(spec, sample, dtype)
    call = case.call.map(lambda t: t.to(device))
    grads = [g.to(device) for g in case.output_grads]

    def run() -> list[torch.Tensor]:
        found = call.gradients(spec.public, grads, names=case.trained, backend=backend)
        return [
            *call.run(spec.public, backend=backend),
            *(t for t in found.values() if t is not None),
        ]

    first = run()
    for i in range(1, repeats):
        for a, b in zip(first, run(), strict=True):
            if not same_bits(a, b):
                return [f"repeat {i} of {repeats} differs"]
    return []


def streams(spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str) -> list[str]:
    """On a side stream the kernel waits for inputs that earlier work there is still writing."""
    call = _on_gpu(spec, sample, dtype)
    expected = call.run(spec.public, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = call.map(torch.zeros_like)
        torch.cuda._sleep(20_000_000)
        for name, t in late.arguments.items():
            if isinstance(t, torch.Tensor):
                t.copy_(call.arguments[name])
        got = late.run(spec.public, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    return _different(expected, got, "on a side stream")


def graph_capture(spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str) -> list[str]:
    """A call captured in a CUDA graph and replayed gives what a plain call on new values gives."""
    call = _on_gpu(spec, sample, dtype)
    for _ in range(3):
        call.run(spec.public, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            got = outputs_of(call.run(spec.public, backend=backend))
    finally:  # a capture that fails leaves its stream the current one
        torch.cuda.set_stream(before)
    for t in call.arguments.values():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    return _different(call.run(spec.public, backend=backend), got, "replayed from a graph")


def out_of_memory(spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str) -> list[str]:
    """A call that finds no memory raises OutOfMemoryError, and the next call is right."""
    call = _on_gpu(spec, sample, dtype)
    expected = call.run(spec.public, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(max(used, 1 << 20) / total)
    hog = []
    for size in (1 << 24, 1 << 20, 1 << 16):  # what both of the allocator's pools still have
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while True:
                hog.append(torch.empty(size, device="cuda"))
    try:
        call.run(spec.public, backend=backend)
    except torch.cuda.OutOfMemoryError:
        pass
    except Exception as error:
        return [f"without memory: {type(error).__name__}: {error}"]
    finally:
        hog.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return _different(expected, call.run(spec.public, backend=backend), "after running out")


def beyond_int32(op: str, backend: str) -> list[str]:
    """On a tensor of more than 2^31 elements, equal rows at its two ends give equal results.

    An offset that overflows 32 bits reads or writes elsewhere.
    """
    torch.cuda.empty_cache()
    x = torch.empty(BEYOND_ROWS, 1024, dtype=torch.float16, device="cuda")
    x[:64].normal_()
    x[64:-64].zero_()
    x[-64:] = x[:64]
    y = _BEYOND[op](x, backend)
    return _different((y[:64],), (y[-64:],), "beyond 2^31 elements")


def _beyond_linear(x: torch.Tensor, backend: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    weight = randn(g, 64, 1024, dtype=torch.float16, scale=1 / 32).cuda()
    return ops.linear_act(x, weight, act="gelu", backend=backend)


def _beyond_patches(x: torch.Tensor, backend: str) -> torch.Tensor:
    weight = randn(torch.Generator().manual_seed(0), 64, 4, 16, 16, dtype=torch.float16).cuda()
    return ops.patch_embed(x.view(-1, 4, 16, 16), weight / 32, backend=backend).flatten(0, 1)


def _beyond_merge(x: torch.Tensor, backend: str) -> torch.Tensor:
    return ops.patch_merge(x.view(-1, 2, 4, 1024), backend=backend).view(-1, 1024)


def _beyond_maps(x: torch.Tensor, backend: str) -> torch.Tensor:
    weight = randn(torch.Generator().manual_seed(0), 1024, 1, 3, 3, dtype=torch.float16).cuda()
    return ops.dwconv_norm(x.view(-1, 4, 4, 1024), weight, backend=backend).view(-1, 1024)


def _beyond_windows(x: torch.Tensor, backend: str) -> torch.Tensor:
    qkv = x.view(-1, 8, 8, 1024)[..., :960].unflatten(-1, (3, 10, 32))
    return ops.window_attention(qkv, (8, 8), backend=backend).flatten(0, 2).flatten(1)


def _beyond_grn(x: torch.Tensor, backend: str) -> torch.Tensor:
    weight = torch.ones(1024, dtype=torch.float16, device="cuda")
    return ops.grn(x.view(-1, 64, 1024), weight, weight, backend=backend).view(-1, 1024)


def _beyond_groups(x: torch.Tensor, backend: str) -> torch.Tensor:
    return ops.group_norm_act(x.view(-1, 64, 4, 4), 32, act="relu", backend=backend).view(-1, 1024)


def _beyond_attention(x: torch.Tensor, backend: str) -> torch.Tensor:
    qkv = x.view(-1, 64, 16, 64)
    return ops.attention(qkv, qkv, qkv, backend=backend).flatten(0, 1)


_BEYOND: dict[str, Callable[[torch.Tensor, str], torch.Tensor]] = {
    "layer_norm": lambda x, b: ops.layer_norm(x, backend=b),
    "rms_norm": lambda x, b: ops.rms_norm(x, backend=b),
    "residual_add": lambda x, b: ops.residual_add(x, x, backend=b),
    "add_norm": lambda x, b: ops.add_norm(x, x, backend=b)[1],
    "norm_add": lambda x, b: ops.norm_add(x, x, backend=b),
    "patch_merge": _beyond_merge,
    "linear_act": _beyond_linear,
    "patch_embed": _beyond_patches,
    "grn": _beyond_grn,
    "window_attention": _beyond_windows,
    "dwconv_norm": _beyond_maps,
    "group_norm_act": _beyond_groups,
    "attention": _beyond_attention,
}
"""Op -> (x [rows, 1024], backend) -> a result of as many rows, each made of rows near it in x."""


Check = Callable[[], list[str]]
"""Gives the faults that it found as sentences."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def checks_of(spec: OpSpec, backend: str, device: str) -> dict[str, Check]:
    """The checks of one backend by name; on a CPU, which Triton's interpreter takes for a GPU, only
    that of determinism, on the smallest samples."""
    on_gpu = device.startswith("cuda")
    wanted, dtypes = ("check", DTYPES) if on_gpu else ("small", DTYPES[1:])
    few = [s for s in spec.samples if wanted in s.tags and "empty" not in s.tags]
    found: dict[str, Check] = {}
    for sample in few[: 4 if on_gpu else 1]:
        for dtype in dtypes:
            found[f"determinism {sample.name} {dtype}"] = partial(
                determinism, spec, sample, dtype, backend, device, REPEATS if on_gpu else 3
            )
    if on_gpu:
        for name, check in (
            ("streams", streams), ("graph capture", graph_capture), ("out of memory", out_of_memory)
        ):  # fmt: skip
            found[name] = partial(check, spec, few[0], torch.float16, backend)
        if spec.name in _BEYOND:
            found["2^31 elements"] = partial(beyond_int32, spec.name, backend)
        found["random problems"] = partial(_fuzzed, spec, backend, device)
    return found


def _fuzzed(spec: OpSpec, backend: str, device: str) -> list[str]:
    return fuzz(spec, backend, device, 0, FUZZ_SECONDS, DTYPES)[1]


def _on_gpu(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> OpCall:
    return materialise(spec, sample, dtype).map(lambda t: t.to("cuda"))


def _different(expected: Any, got: Any, when: str) -> list[str]:
    """A fault for each output whose bits differ from the expected one's."""
    pairs = zip(outputs_of(expected), outputs_of(got), strict=True)
    return [f"output {i} differs {when}" for i, (a, b) in enumerate(pairs) if not same_bits(a, b)]
