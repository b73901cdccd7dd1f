"""Prepared launches of Triton kernels: the kernel and arguments that Triton itself would launch."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels run in Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

import vitfast  # noqa: E402
from vitfast.runtime import kernel_calls  # noqa: E402
from vitfast.runtime.kernel_calls import cdiv, launch, next_power_of_2  # noqa: E402
from vitfast.runtime.launches import Launch  # noqa: E402
from vitfast.settings import settings  # noqa: E402
from vitfast.testing.no_launch import launching_nothing  # noqa: E402


@triton.jit(do_not_specialize=["n"])
def scale_kernel(
    x_ptr, bias_ptr, y_ptr, n, stride, factor,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, at < n, other=0.0).to(ACC) * factor
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(y_ptr + at, x, at < n)


@pytest.fixture
def driver():
    with launching_nothing() as found:
        yield found


X = torch.zeros(64)
DEFAULT = (X, None, X, 40, 1, 0.5)
OTHER_CALLS = {
    "dtype": (X.half(), None, X, 40, 1, 0.5),
    "alignment": (X[1:], None, X, 40, 1, 0.5),
    "a tensor more": (X, X, X, 40, 1, 0.5),
    "count": (X, None, X, 48, 1, 0.5),
    "stride 2": (X, None, X, 40, 2, 0.5),
    "stride 16": (X, None, X, 40, 16, 0.5),
    "stride 2**40": (X, None, X, 40, 2**40, 0.5),
    "factor": (X, None, X, 40, 1, 1.0),
    "memory": (X.clone(), None, X.clone(), 40, 1, 0.5),
}


def call(args, kind=0, block=16, warps=4):
    constants = {"KIND": kind, "ACC": tl.float32}
    launch(scale_kernel, 3, args, constants, Launch({"BLOCK": block}, warps, 1))


def own(args, kind=0, block=16, warps=4):
    """Triton's own launch."""
    options = Launch({"BLOCK": block}, warps, 1)
    scale_kernel[(3,)](*args, KIND=kind, ACC=tl.float32, **options.blocks, **options.options())


def same(one, other):
    """Launches, but for the metadata and hooks that only a profiler looks at."""
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b)
        for i, (a, b) in enumerate(zip(one, other, strict=True))
        if not 6 <= i <= 8
    )


@pytest.mark.parametrize("order", [1, -1])
def test_launches_are_those_of_triton(driver, order):
    kinds = list(itertools.product((DEFAULT, *OTHER_CALLS.values()), (0, 1), (16, 32), (4, 8)))
    for _ in range(2):
        for args, kind, block, warps in kinds[::order]:
            driver.launches.clear()
            own(args, kind, block, warps)
            call(args, kind, block, warps)
            theirs, ours = driver.launches
            assert same(theirs, ours)
    compiled = {id(p.compiled) for p in kernel_calls._PREPARED.values()}
    (cache, *_) = scale_kernel.device_caches[10_000]
    assert compiled <= {id(c) for c in cache.values()} and len(compiled) > 40


def test_the_second_call_of_a_kind_is_launched_at_once(driver, monkeypatch):
    call(DEFAULT)
    monkeypatch.setattr(type(scale_kernel), "run", None)  # what kernel[grid] calls
    for name in ("memory", "factor"):
        call(OTHER_CALLS[name])
    assert len(driver.launches) == 3
    with pytest.raises(TypeError):
        call(OTHER_CALLS["dtype"])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_sees_launches_as_triton_makes_them(driver, hook, monkeypatch):
    call(DEFAULT)
    chain = type(getattr(triton.knobs.runtime, hook))()
    chain.add(lambda metadata: None)
    with triton.knobs.runtime.scope():
        setattr(triton.knobs.runtime, hook, chain)
        call(DEFAULT)
    place = 7 if hook == "launch_enter_hook" else 8
    assert driver.launches[1][place] is chain and driver.launches[0][6] is not None
    call(DEFAULT)
    assert driver.launches[2][6:9] == (None, None, None)


def test_what_is_remembered_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(kernel_calls, "_MOST", 5)
    for n in range(30):
        call((X, None, X, n, 1, 0.5))
    assert len(kernel_calls._PREPARED) <= 5


def test_a_block_launches_prepared_kernels_and_crosses_no_ops_boundary(driver, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, init_values=1e-5)
    block = model.eval().half().blocks[0]
    vitfast.swap(block)
    settings.backend = "triton"
    x = torch.zeros(1, 5, 192, dtype=torch.float16)
    with torch.inference_mode():
        assert block(x).shape == x.shape
        driver.launches.clear()
        kernels = {id(p.compiled.function) for p in kernel_calls._PREPARED.values()}
        monkeypatch.setattr(type(scale_kernel), "run", None)
        monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)
        assert block(x).shape == x.shape
    assert len(driver.launches) == 8 and kernels


def test_integers():
    for n in range(1, 70):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, b) for b in (1, 7, 16)] == [triton.cdiv(n, b) for b in (1, 7, 16)]
