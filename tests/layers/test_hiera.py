"""Hiera's blocks and attention beside timm's: mask units, and attention over all tokens."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import hiera

from vitfast import layers, swap
from vitfast.engine import rows as by_rows

C, HEADS = 32, 2
BLOCKS = {
    "units": dict(window_size=16, use_mask_unit_attn=True),
    "global": dict(window_size=16),
    "layer_scale": dict(window_size=4, use_mask_unit_attn=True, init_values=0.1),
    "drop_path": dict(window_size=4, use_mask_unit_attn=True, drop_path=0.5),
}


def block(name: str, **more) -> torch.nn.Module:
    return hiera.HieraBlock(C, more.pop("dim_out", C), HEADS, **BLOCKS[name] | more)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training, autocast):
    module = lively(block(name)).train(training)
    found = parity(module, torch.randn(4, 48, C), autocast=autocast)
    assert type(found) is layers.HieraBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_block_dtypes(parity, lively, dtype):
    parity(lively(block("units")).to(dtype).eval(), torch.randn(2, 48, C, dtype=dtype))


@pytest.mark.parametrize("tokens", [400, 1008])
def test_stripes(parity, lively, monkeypatch, tokens):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 130)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    parity(lively(block("units")).eval(), torch.randn(2, tokens, C), backward=False)


@pytest.mark.parametrize("tokens", [34, 16, 20, 51])
def test_units_of_another_size_than_told(parity, lively, tokens):
    """timm rounds the number of units down, and makes them larger."""
    parity(lively(block("units")), torch.randn(2, tokens, C))


@pytest.mark.parametrize("tokens", [35, 8])
def test_units_that_do_not_divide_are_refused_as_by_timm(tokens):
    module = block("units")
    swap(module)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        module(torch.randn(2, tokens, C))


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_attention(parity, lively, units, fused):
    module = lively(hiera.MaskUnitAttention(C, 48, 3, 1, 16, units))
    module.fused_attn = fused
    assert type(parity(module, torch.randn(2, 48, C))) is layers.HieraMaskUnitAttention


@pytest.mark.parametrize("change", [dict(dim_out=2 * C), dict(q_stride=4)], ids=str)
def test_pooling_and_widening_blocks_are_left_alone(change):
    report = swap(block("units", **change))
    assert report.counts["blocks_swapped"] == 0
    assert report.skipped[0].reason in ("it widens its input", "its queries are pooled")


def least_gap(module: torch.nn.Module, x: torch.Tensor) -> float:
    """The least difference between the two largest values that any pooling of the model chose from.

    A gradient jumps where they change places: nearer than rounding, none of the two is wrong.
    """
    amax, gaps = torch.Tensor.amax, []

    def seen(self: torch.Tensor, dim: int) -> torch.Tensor:
        gaps.append(self.topk(2, dim).values.diff(dim=dim).abs().min().item())
        return amax(self, dim)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "amax", seen)
        copy.deepcopy(module).double()(x.double())
    assert len(gaps) == 6  # queries and tokens at three poolings
    return min(gaps)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast):
    made = timm.create_model(
        "hiera_tiny_224",
        img_size=64, embed_dim=16, num_heads=1, stages=(2, 2, 2, 1), num_classes=10,
    )  # fmt: skip
    module = lively(made).eval()
    torch.nn.init.normal_(module.head.fc.weight)
    x = max(torch.randn(32, 1, 3, 64, 64), key=lambda image: least_gap(module, image))
    assert least_gap(module, x) > 1e-6  # a hundred times the rounding errors
    found = parity(module, x, autocast=autocast, fused=False)
    assert sum(type(b) is layers.HieraBlock for b in found.blocks) == 4


def test_one_graph(lively, one_graph):
    module = lively(torch.nn.Sequential(block("units"), block("global"))).eval()
    swap(module)
    text = one_graph(module, torch.randn(2, 48, C))
    assert text.count("vitfast.window_attention.default") == 1


def test_masked_units(lively):
    """As in pretraining, where most units are missing."""
    theirs = lively(timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x, mask = torch.randn(2, 3, 224, 224), torch.zeros(2, 49, dtype=torch.bool)
    mask[:, ::3] = True
    with torch.no_grad():
        got, want = (m.forward_features(x, mask=mask) for m in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
