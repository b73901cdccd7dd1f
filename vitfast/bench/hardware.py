"""What only the hardware can show of GPU kernels: checks beyond the samples of the specs.

Each check takes an op's spec, a backend and a device, and gives the faults that it found. Those
that need no GPU (`fuzz`, `determinism`) run on the CPU too.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vitfast import ops
from vitfast.errors import BackendUnavailableError
from vitfast.ops.spec import OpSpec, Sample, randn
from vitfast.testing.cases import Case
from vitfast.testing.inputs import OpCall, materialise, outputs_of

REPEATS = 50


def determinism(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str, device: str,
    repeats: int = REPEATS,
) -> list[str]:  # fmt: skip
    """The same bits every time, forward and backward."""
    case = Case(spec, sample, dtype)
    call = case.call.map(lambda t: t.to(device))
    grads = [g.to(device) for g in case.output_grads]

    def run() -> list[torch.Tensor]:
        found = call.gradients(spec.public, grads, names=case.trained, backend=backend)
        return [*call.run(spec.public, backend=backend), *filter(_is_tensor, found.values())]

    first = run()
    for i in range(1, repeats):
        for a, b in zip(first, run(), strict=True):
            if not torch.equal(_bits(a), _bits(b)):
                return [f"repeat {i} of {repeats} differs"]
    return []


def fuzz(
    spec: OpSpec, backend: str, device: str, seed: int, seconds: float, dtypes: list[torch.dtype]
) -> tuple[int, list[str]]:
    """Random shapes until the time is over: how many ran, and the faults, each with its seed.

    A fault is replayed by `fuzz_one` with the same number.
    """
    ran, wrong = 0, []
    end = time.monotonic() + seconds
    for number in itertools.count(seed):
        if time.monotonic() > end:
            break
        try:
            wrong += fuzz_one(spec, backend, device, number, dtypes)
            ran += 1
        except BackendUnavailableError:
            continue
    return ran, wrong


def fuzz_one(
    spec: OpSpec, backend: str, device: str, seed: int, dtypes: list[torch.dtype]
) -> list[str]:
    """One random problem, drawn from its number alone."""
    dtype = dtypes[seed % len(dtypes)]
    sample = Sample(f"seed_{seed}", lambda d, g: random_call(spec.name, d, seed))
    case = Case(spec, sample, dtype)
    try:
        call = case.call.map(lambda t: t.to(device))
        outputs = [t.cpu() for t in call.run(spec.public, backend=backend)]
        reports = case.judge(outputs, backend)
        found = call.gradients(
            spec.public, [g.to(device) for g in case.output_grads], names=case.trained,
            backend=backend,
        )  # fmt: skip
        found = {n: None if t is None else t.cpu() for n, t in found.items()}
        reports += case.judge_gradients(found, backend)
    except BackendUnavailableError:
        raise
    except Exception as error:
        return [f"seed {seed} {dtype}: {type(error).__name__}: {error}"]
    return [f"seed {seed} {dtype}: {p}" for r in reports for p in r.problems]


def random_call(op: str, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op, small and odd, that depend on the number only.

    Sizes vary freely. What kernels are compiled for (head dim, patch, activation) comes from short
    lists, or a GPU's time would go into compiling. No row is so short that its norm or its softmax
    is constant, and its gradient nothing but rounding.
    """
    g = torch.Generator().manual_seed(zlib.crc32(f"{op} {seed}".encode()))

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return randn(g, *shape, dtype=dtype, scale=scale)

    return _RANDOM[op](pick, size, tensor)


def _norm(pick, size, tensor):
    c = pick(size(3, 80), size(81, 1100), 384, 768)
    x = tensor(size(1, 3), size(1, 40), c)
    weight, bias = pick((None, None), (1 + tensor(c, scale=0.1), tensor(c, scale=0.1)))
    return (x, weight, bias, pick(1e-6, 1e-5)), {}


def _rms_norm(pick, size, tensor):
    (x, weight, _, eps), _ = _norm(pick, size, tensor)
    return (x, weight, eps), {}


def _residual(pick, size, tensor):
    b, n, c = size(1, 3), size(1, 40), pick(size(3, 80), size(81, 1100), 768)
    options = {}
    if pick(True, False):
        options["gamma"] = tensor(c)
    if pick(True, False):
        options["drop_scale"] = torch.tensor([1.25, *(pick(0.0, 1.25) for _ in range(b - 1))])
    return (tensor(b, n, c), tensor(b, n, c)), options


def _add_norm(pick, size, tensor):
    (x, branch), options = _residual(pick, size, tensor)
    c = x.shape[-1]
    kind = pick("layer", "rms")
    bias = tensor(c, scale=0.1) if kind == "layer" else None
    return (x, branch, 1 + tensor(c, scale=0.1), bias, 1e-6), {**options, "norm": kind}


def _norm_add(pick, size, tensor):
    (x, branch, weight, bias, eps), options = _add_norm(pick, size, tensor)
    options.pop("gamma", None)
    return (x, branch, weight, bias, eps), options


def _patch_merge(pick, size, tensor):
    c = pick(size(3, 80), 96, 128, 192, 384)
    x = tensor(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    weight = None if norm is None else 1 + tensor(4 * c, scale=0.1)
    bias = tensor(4 * c, scale=0.1) if norm == "layer" else None
    return (x, weight, bias), {"norm": norm}


def _attention(pick, size, tensor):
    b, h, d = size(1, 2), size(1, 3), pick(13, 64, 64, 72, 128)
    n = pick(size(2, 20), size(21, 300))
    k = pick(n, size(2, 200))
    options: dict[str, Any] = {}
    if pick(True, False, False):
        options["bias"] = tensor(h, n, k)
    if pick(True, False, False):
        options["mask"] = tensor(b, 1, 1, k) > -1.0
        options["mask"][..., 0] = True
    if pick(True, False, False):
        options["is_causal"] = True
    if pick(True, False, False):
        options["qk_norm"] = pick("layer", "rms")
    return (tensor(b, n, h, d), tensor(b, k, h, d), tensor(b, k, h, d)), options


def _linear_act(pick, size, tensor):
    m, n, k = size(1, 300), 2 * size(1, 150), pick(size(1, 70), size(71, 800))
    gate = pick(None, None, "first", "last")
    act = pick("none", "gelu", "silu")
    x, weight = tensor(m, k), tensor(n, k, scale=k**-0.5)
    return (x, weight, pick(None, tensor(n, scale=0.1)), act), {"gate": gate}


def _mlp(pick, size, tensor):
    (x, weight, bias, act), options = _linear_act(pick, size, tensor)
    hidden, out = len(weight) // (2 if options["gate"] else 1), size(1, 90)
    return (x, weight, bias, tensor(out, hidden, scale=hidden**-0.5), None, act), options


def _patch_embed(pick, size, tensor):
    (p, q, cin), c = pick((16, 16, 3), (14, 14, 3), (5, 3, 4)), size(1, 100)
    rows, columns, b = size(1, 6), size(1, 6), size(1, 3)
    n = rows * columns
    options: dict[str, Any] = {}
    prefix = pick(0, 1, 5)
    if prefix:
        options["prefix"] = tensor(1, prefix, c)
    if pick(True, False):
        options["pos_embed"] = tensor(1, pick(n, n + prefix), c)
    weight = tensor(c, cin, p, q, scale=(cin * p * q) ** -0.5)
    return (tensor(b, cin, rows * p, columns * q), weight, pick(None, tensor(c))), options


def _window_attention(pick, size, tensor):
    heads, dim = size(1, 3), pick(16, 32, 44)
    window = pick((4, 4), (7, 7), (5, 6), (9, 8))
    shift = pick((0, 0), (window[0] // 2, window[1] // 2), (0, 1))
    # Where nearly all keys are padding, PyTorch sums equal numbers, with next to no error.
    high, wide = (size(w // 2 + 1, 20) for w in window)
    qkv = tensor(size(1, 2), high, wide, 3, heads, dim)
    table = tensor((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    # A shift can leave the padding alone in its bands: it would have no gradient to speak of.
    whole = high % window[0] == wide % window[1] == 0
    pad = None if any(shift) or whole else pick(None, tensor(3, heads, dim))
    return (qkv, window, shift, table, pad), {"roll_first": pick(True, False)}


def _dwconv_norm(pick, size, tensor):
    c, k, q = pick(size(3, 80), 96, 192, size(81, 400)), pick(3, 5, 7, 7, 9), pick(3, 7, 7, 11)
    x = tensor(size(1, 3), size(1, 14), size(1, 14), c)
    norm = pick("layer", "layer", "rms", None)
    bias = pick(None, tensor(c, scale=0.1))
    norm_weight = None if norm is None else 1 + tensor(c, scale=0.1)
    norm_bias = tensor(c, scale=0.1) if norm == "layer" else None
    weight = tensor(c, 1, k, q, scale=(k * q) ** -0.5)
    return (x, weight, bias, norm_weight, norm_bias), {"norm": norm}


def _grn(pick, size, tensor):
    c = pick(size(3, 80), size(81, 1100), 384)
    x = tensor(size(1, 3), size(2, 20), size(2, 20), c)
    if pick(True, False):
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    return (x, tensor(c), tensor(c)), {}


def _group_norm_act(pick, size, tensor):
    groups = size(1, 6)
    shape = (size(1, 3), groups * size(1, 12), size(2, 20), size(2, 20))
    c = shape[1]
    weight, bias = pick((None, None), (1 + tensor(c, scale=0.1), tensor(c, scale=0.1)))
    maps = [t.to(memory_format=pick(torch.channels_last, torch.contiguous_format))
            for t in (tensor(*shape), tensor(*shape))]  # fmt: skip
    options = {"residual": pick(None, maps[1]), "act": pick("none", "relu")}
    return (maps[0], groups, weight, bias), options


_RANDOM: dict[str, Callable[..., Any]] = {
    "layer_norm": _norm,
    "rms_norm": _rms_norm,
    "add_norm": _add_norm,
    "norm_add": _norm_add,
    "residual_add": _residual,
    "attention": _attention,
    "linear_act": _linear_act,
    "mlp": _mlp,
    "patch_embed": _patch_embed,
    "patch_merge": _patch_merge,
    "window_attention": _window_attention,
    "dwconv_norm": _dwconv_norm,
    "grn": _grn,
    "group_norm_act": _group_norm_act,
}


# ---- what needs a GPU ----------------------------------------------------------------------------


def streams(spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str) -> list[str]:
    """On a side stream, with work in flight on it, the kernel waits for its inputs."""
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
    """Captured in a CUDA graph and replayed on other values."""
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
    """Tensors of more than 2^31 elements: their end is as right as their beginning."""
    torch.cuda.empty_cache()
    rows, run = _BEYOND[op]
    x = torch.empty(rows, 1024, dtype=torch.float16, device="cuda")
    x[:64].normal_()
    x[64:-64].zero_()
    x[-64:] = x[:64]
    y = run(x, backend)
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


_BEYOND: dict[str, tuple[int, Callable[[torch.Tensor, str], torch.Tensor]]] = {
    "layer_norm": (2**21 + 128, lambda x, b: ops.layer_norm(x, backend=b)),
    "rms_norm": (2**21 + 128, lambda x, b: ops.rms_norm(x, backend=b)),
    "residual_add": (2**21 + 128, lambda x, b: ops.residual_add(x, x, backend=b)),
    "add_norm": (2**21 + 128, lambda x, b: ops.add_norm(x, x, backend=b)[1]),
    "norm_add": (2**21 + 128, lambda x, b: ops.norm_add(x, x, backend=b)),
    "patch_merge": (2**21 + 128, _beyond_merge),
    "linear_act": (2**21 + 128, _beyond_linear),
    "patch_embed": (2**21 + 128, _beyond_patches),
    "grn": (2**21 + 128, _beyond_grn),
    "window_attention": (2**21 + 128, _beyond_windows),
    "dwconv_norm": (2**21 + 128, _beyond_maps),
    "group_norm_act": (2**21 + 128, _beyond_groups),
    "attention": (
        2**21 + 128,
        lambda x, b: ops.attention(*(x.view(-1, 64, 16, 64),) * 3, backend=b).flatten(0, 1),
    ),
}


def all_checks(spec: OpSpec, backend: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """(name, faults) of every check of one op's backend on the GPU."""
    few = [s for s in spec.samples if "check" in s.tags and "empty" not in s.tags]
    checks = {"streams": streams, "graph capture": graph_capture, "out of memory": out_of_memory}
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for sample in few[:4]:
        for dtype in dtypes:
            yield from _guarded(
                f"determinism {sample.name} {dtype}",
                lambda s=sample, d=dtype: determinism(spec, s, d, backend, "cuda"),
            )
    for name, check in checks.items():
        yield from _guarded(name, lambda c=check: c(spec, few[0], torch.float16, backend))
    if spec.name in _BEYOND:
        yield from _guarded("2^31 elements", lambda: beyond_int32(spec.name, backend))
    ran, wrong = fuzz(spec, backend, "cuda", seed, 8.0, dtypes)
    yield f"fuzz: {ran} problems from seed {seed}", wrong


def _guarded(name: str, check: Callable[[], list[str]]) -> Iterator[tuple[str, list[str]]]:
    try:
        yield name, check()
    except BackendUnavailableError:
        return
    except Exception as error:  # one check's crash is a finding, not the end
        yield name, [f"{type(error).__name__}: {error}"]


def _on_gpu(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> OpCall:
    return materialise(spec, sample, dtype).map(lambda t: t.to("cuda"))


def _different(expected: Any, got: Any, when: str) -> list[str]:
    pairs = zip(outputs_of(expected), outputs_of(got), strict=True)
    return [
        f"output {i} differs {when}"
        for i, (a, b) in enumerate(pairs)
        if not torch.equal(_bits(a), _bits(b))
    ]


def _bits(t: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN equals itself and -0 differs from 0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(whole[t.element_size()]) if t.is_floating_point() else t


def _is_tensor(t: Any) -> bool:
    return isinstance(t, torch.Tensor)
