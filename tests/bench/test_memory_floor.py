"""What inference of a model holds at least, against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vitfast import swap
from vitfast.bench import modules
from vitfast.bench.memory_floor import memory_floor_mb
from vitfast.bench.peers import Setting

PLAIN, BF16 = Setting(), Setting(torch.bfloat16)


def held(case: modules.Case) -> int:
    weights = [*case.module.parameters(), *case.module.buffers()]
    return sum(t.numel() * t.element_size() for t in (*weights, *case.inputs))


@pytest.mark.parametrize(("setting", "operand"), [(PLAIN, 4), (BF16, 2)])
def test_of_a_vit_it_is_qkv_and_two_streams(setting, operand):
    case = modules.model_case("vit_tiny_patch16_224", (64, 96), 2, setting)
    tokens = 2 * (4 * 6 + 1)
    # Under autocast timm's residual stream is float32: the embedding adds to a float32 parameter.
    expected = held(case) + tokens * 192 * (2 * 4 + 3 * operand)
    assert memory_floor_mb(case.module, case.inputs, setting) == pytest.approx(expected / 1e6)


@pytest.mark.parametrize(
    ("name", "channels"), [("swin_tiny_patch4_window7_224", 96), ("convnext_atto", 40)]
)
def test_of_maps_it_is_two_of_the_largest(name, channels):
    case = modules.model_case(name, (64, 96), 1, PLAIN)
    expected = held(case) + 2 * 16 * 24 * channels * 4
    assert memory_floor_mb(case.module, case.inputs, PLAIN) == pytest.approx(expected / 1e6)


def test_none_where_it_is_not_known():
    case = modules.model_case("resnet18", (64, 64), 1, PLAIN)
    assert memory_floor_mb(case.module, case.inputs, PLAIN) is None
    case = modules.model_case("vit_tiny_patch16_224", (64, 64), 1, Setting(train=True))
    assert memory_floor_mb(case.module, case.inputs, case.setting) is None
    # A size that the model refuses.
    assert memory_floor_mb(case.module, (torch.randn(1, 3, 50, 50),), PLAIN) is None


def test_no_hook_is_left():
    case = modules.model_case("vit_tiny_patch16_224", (64, 64), 1, PLAIN)
    memory_floor_mb(case.module, case.inputs, PLAIN)
    assert not any(m._forward_hooks for m in case.module.modules())
    assert not [entry for entry in swap(case.module).swapped if entry.note]
