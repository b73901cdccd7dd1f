"""What a swapped model costs where its ops run in torch: no more than timm's, beside what is named.

Counted by torch's profiler, on every backend that is made of torch's own operations; of the others
it sees only the call.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vitfast import swap
from vitfast.ops import spec_of
from vitfast.ops.attention import reference, vendor
from vitfast.runtime.dispatch import Dispatcher
from vitfast.settings import settings

MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, init_values=0.1), 32),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=56, depths=(2, 2)), 56),
    "swin_v2": ("swinv2_tiny_window8_256", dict(img_size=64, depths=(2, 2)), 64),
    "convnext": ("convnext_atto", dict(depths=(2, 1, 1, 1)), 64),
    "hybrid": ("vit_small_r26_s32_224", dict(img_size=64, depth=2), 64),
}
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
KINDS = {
    FLASH: "attention forward", f"{FLASH}_backward": "attention backward",
    "aten::_convolution": "convolution", "aten::convolution_backward": "convolution backward",
}  # fmt: skip


class Bound(NamedTuple):
    """What a swapped model may cost, as a factor of timm's cost where nothing else is said.

    Args:
        bytes: allocated in all. torch's ops of one op of ours allocate one after the other, where
            timm's are fused or in place (ReLU).
        kept: bytes that a training forward leaves for its backward.
        flops, convolutions: in training, the latter as a number beside timm's, less those that run
            as products. In inference nothing is computed twice.
        reason: why more than timm's is computed, or kept.
    """

    bytes: float
    kept: float
    flops: float = 1.0
    convolutions: int = 0
    reason: str = ""


SCORES = "window attention makes its scores again: N numbers a token and head, if they were kept"
BOUNDS = {
    "vit": Bound(1.08, 0.69),
    "swin": Bound(1.26, 0.61, 1.010, reason=SCORES),
    "swin_v2": Bound(1.16, 0.59, 1.013, reason=SCORES),
    "convnext": Bound(
        1.18, 0.64, 1.024, 5,
        "a depthwise convolution runs again for its norm's backward: its result is as large as x",
    ),
    "hybrid": Bound(
        1.41, 1.36, reason="3 x 3 kernels are kept channels last, too, whatever the image's size"
    ),
}  # fmt: skip


def flops(event: torch.autograd.profiler_util.FunctionEvent) -> int:
    """Of one event of the profiler: products, convolutions and attention; 0 of anything else."""
    name, shapes, values = event.name, event.input_shapes, event.concrete_inputs
    if name == "aten::addmm":
        name, shapes = "aten::mm", shapes[1:]
    if name in ("aten::mm", "aten::bmm"):
        return 2 * math.prod(shapes[0]) * shapes[1][-1]
    if name == "mkldnn::_linear_pointwise":
        return 2 * math.prod(shapes[0]) * shapes[1][0]
    if name in (FLASH, f"{FLASH}_backward"):
        backward = name != FLASH
        q, k = shapes[backward : backward + 2]
        return (10 if backward else 4) * math.prod(q) * k[2]
    if name == "aten::_convolution":
        image, kernel, *_ = shapes
        stride, padding, dilation = values[3:6]
        size = [
            (n + 2 * p - d * (w - 1) - 1) // s + 1
            for n, w, s, p, d in zip(
                image[2:], kernel[2:], *(_pair(v) for v in (stride, padding, dilation)), strict=True
            )
        ]
        return 2 * image[0] * math.prod(kernel) * math.prod(size)
    if name == "aten::convolution_backward":
        grad, _, kernel, *_ = shapes
        return 2 * sum(values[10][:2]) * grad[0] * math.prod(grad[2:]) * math.prod(kernel)
    return 0


def _pair(value: list[int]) -> list[int]:
    return value * 2 if len(value) == 1 else value


def cost(model: nn.Module, x: torch.Tensor, train: bool) -> Counter:
    """Flops, and how often each of `KINDS` runs, of a forward and, to train, its backward.

    "bytes" is what is allocated in both, "kept" what a forward leaves for the backward.
    """
    for p in model.parameters():
        p.grad = None
    total: Counter = Counter()
    out = None
    for forward in (True, False) if train else (True,):
        with profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
        ) as seen:
            if forward:
                with torch.set_grad_enabled(train):
                    out = model(x)
            else:
                out.sum().backward()
        for event in seen.events():
            total["flops"] += flops(event)
            if event.name in KINDS:
                total[KINDS[event.name]] += 1
        sizes = [
            e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
        ]
        total["bytes"] += sum(n for n in sizes if n > 0)
        total["kept"] += sum(sizes) if forward and train else 0
    return total


@pytest.fixture(params=["reference", "vendor"])
def backend(request, monkeypatch):
    """Every op on its reference; or on the vendor's backend, where it has one that can run."""
    pick = Dispatcher.pick

    def vendor_first(self, name, *args, needs_backward=False):
        vendor = self.backends.get("vendor")
        if vendor is not None and not vendor.can_run(*args):
            return vendor
        return pick(self, name, *args, needs_backward=needs_backward)

    if request.param == "vendor":
        monkeypatch.setattr(Dispatcher, "pick", vendor_first)
    return request.param


def make(name: str, lively) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """timm's model, a swapped copy whose ops run on the backend under test, and images."""
    architecture, options, size = MODELS[name]
    model = lively(timm.create_model(architecture, num_classes=10, **options)).eval()
    ours = copy.deepcopy(model)
    swap(ours)
    settings.backend = "reference"
    return model, ours, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_work(lively, backend, name, train):
    model, ours, x = make(name, lively)
    timms, found, bound = cost(model, x, train), cost(ours, x, train), BOUNDS[name]
    assert found["attention forward"] == (timms["attention forward"] if backend == "vendor" else 0)
    assert found["attention backward"] == (found["attention forward"] if train else 0)
    factor = found["flops"] / timms["flops"]
    if train:
        assert factor <= bound.flops
        as_products = timms["convolution backward"] - found["convolution backward"]
        assert found["convolution"] == timms["convolution"] - as_products + bound.convolutions
    else:
        assert factor <= 1
        assert found["convolution"] <= timms["convolution"]
    if backend == "reference":  # where all products are seen, the bound is met and not generous
        assert factor > (bound.flops - 0.001 if train else 1 - 1e-9)
    assert found["kept"] <= bound.kept * timms["kept"]
    weights = sum(p.nbytes for p in ours.parameters())
    # oneDNN lays them out anew in each pass.
    packed = (1 + train) * weights if backend == "vendor" else 0
    assert found["bytes"] <= bound.bytes * timms["bytes"] + packed


def test_a_second_forward_would_be_seen(lively, monkeypatch, backend):
    """As autograd would have run it, for the backward."""

    def again(grad, call, *saved):
        vendor.compute(call)
        return reference.backward(grad, call)

    model, ours, x = make("vit", lively)
    dispatcher = spec_of("attention").dispatcher
    for name in ("vendor", "reference"):
        changed = dataclasses.replace(dispatcher.backends[name], backward=again)
        monkeypatch.setitem(dispatcher.backends, name, changed)
    timms, found = cost(model, x, True), cost(ours, x, True)
    wanted = timms["attention forward"] if backend == "vendor" else 0
    assert found["attention forward"] == wanted + 2  # a block each
    assert backend == "vendor" or found["flops"] > timms["flops"]


def test_what_is_more_than_timms_has_a_reason():
    for bound in BOUNDS.values():
        more = bound.flops > 1 or bound.convolutions or bound.kept > 1
        assert bool(bound.reason) == more
