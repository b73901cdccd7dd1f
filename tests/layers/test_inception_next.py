"""InceptionNeXt's block beside timm's: an MLP and residual add behind timm's mixer and norm."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import inception_next
from torch import nn

from vitfast import layers, swap
from vitfast.engine import rows as by_rows

C = 24
BLOCKS = {
    "plain": dict(),
    "no_gamma": dict(ls_init_value=None),
    "drop_path": dict(drop_path=0.5),
    "dilation": dict(dilation=2),
    "layer_norm": dict(norm_layer=timm.layers.LayerNorm2d),
    "silu": dict(act_layer=nn.SiLU, mlp_ratio=2),
}
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def block(name: str, dim: int = C, **more) -> nn.Module:
    return inception_next.MetaNeXtBlock(dim, **BLOCKS[name] | more)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, autocast):
    x = torch.randn(3, C, 13, 11)
    found = parity(lively(block(name)).eval(), x, autocast=autocast, backward=False)
    assert type(found) is layers.InceptionNeXtBlock


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_training_is_timms(lively, name, training):
    theirs = lively(block(name)).train(training)
    ours = copy.deepcopy(theirs)
    swap(ours)
    results = []
    for module in (theirs, ours):
        x = torch.randn(3, C, 13, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    if name != "layer_norm":  # which is swapped itself
        assert all(map(torch.equal, *results))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_trained_mixer_before_a_frozen_tail(lively, autocast):
    """What the MLP itself is given decides, not only what goes into the block."""
    module = lively(block("plain")).eval()
    module.requires_grad_(False)
    module.token_mixer.requires_grad_(True)
    theirs, ours = module, copy.deepcopy(module)
    swap(ours)
    x = torch.randn(3, C, 13, 11)
    found = []
    for one in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            y = one(x)
        found.append(torch.autograd.grad(y.sum(), list(one.token_mixer.parameters())))
    low = dict(rtol=0.1, atol=0.5) if autocast else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*found, **low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(parity, lively, dtype):
    x = torch.randn(2, C, 8, 8, dtype=dtype)
    parity(lively(block("plain")).to(dtype).eval(), x, backward=False)


@layouts
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (31, 17)], ids=str)
def test_sizes_and_layouts(parity, lively, size, layout):
    x = torch.randn(2, 40, *size).to(memory_format=layout)
    found = parity(lively(block("plain", dim=40)).eval(), x, backward=False)
    with torch.no_grad():
        assert found(x).permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, C, 20, 20), (9, C, 9, 9)], ids=str)
def test_chunks(parity, lively, monkeypatch, shape, autocast):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 130)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    parity(lively(block("plain")).eval(), torch.randn(shape), backward=False, autocast=autocast)


def test_running_statistics_are_timms(lively):
    theirs = lively(block("drop_path")).train()
    ours = copy.deepcopy(theirs)
    swap(ours)
    for _ in range(3):
        x = torch.randn(2, C, 8, 8)
        ours(x), theirs(x)
    assert torch.equal(ours.norm.running_var, theirs.norm.running_var)
    assert torch.equal(ours.norm.num_batches_tracked, theirs.norm.num_batches_tracked)


def test_inference_leaves_the_ops(lively, monkeypatch, by_name):
    module = lively(block("plain")).eval()
    swap(module)
    monkeypatch.setattr("vitfast.blocks.mlp_residual.apply_mlp", None)
    with torch.no_grad():
        module(torch.randn(2, C, 8, 8))
        with by_name("reference"), pytest.raises(TypeError, match="NoneType"):
            module(torch.randn(2, C, 8, 8))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(act_layer=nn.Mish), "Mish"),
        (dict(mlp_layer=nn.Conv2d), "mlp is a Conv2d"),
    ],
    ids=str,
)
def test_others_are_left_to_timm(options, reason):
    if "mlp_layer" in options:
        options = dict(mlp_layer=lambda dim, hidden, act_layer, **kw: nn.Conv2d(dim, dim, 1))
    module = block("plain", **options).eval()
    ours, x = copy.deepcopy(module), torch.randn(2, C, 9, 8)
    report = swap(ours)
    whys = [e.reason for e in report.skipped] + [e.note for e in report.swapped]
    assert [why for why in whys if why] and reason in whys[0]
    with torch.no_grad():
        assert torch.equal(ours(x), module(x))


def test_a_norm_that_changes_the_dtype_is_refused_as_by_timm():
    class Lower(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    module = block("plain").eval()
    module.norm = Lower()
    swap(module)
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match="[Tt]ype|BFloat16"):
        module(torch.randn(2, C, 8, 8))


def test_dropout_in_the_mlp_draws_as_timms(lively):
    theirs = lively(block("plain")).train()
    theirs.mlp.drop.p = 0.5
    ours = copy.deepcopy(theirs)
    assert "drops 0.5" in swap(ours).swapped[0].note
    x = torch.randn(2, C, 8, 8)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    assert torch.equal(*results)


CHILDREN = ["token_mixer", "token_mixer.dwconv_w", "norm", "mlp", "mlp.fc1", "mlp.act", "mlp.drop"]


@pytest.mark.parametrize("child", [*CHILDREN, "mlp.norm", "drop_path"])
def test_hooks_are_called(lively, hook_calls, child):
    module = lively(block("plain")).eval()
    assert hook_calls(module, torch.randn(2, C, 6, 7), child) == 1


def small() -> nn.Module:
    return timm.create_model(
        "inception_next_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), num_classes=10
    )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_model(parity, lively, autocast):
    found = parity(
        lively(small()).eval(), torch.randn(2, 3, 75, 96), autocast=autocast, fused=False
    )
    assert sum(type(m) is layers.InceptionNeXtBlock for m in found.modules()) == 5


def test_one_graph(lively, one_graph):
    module = lively(small()).eval()
    swap(module)
    text = one_graph(module, torch.randn(1, 3, 64, 64))
    assert text.count("vitfast.mlp.default") == 5
