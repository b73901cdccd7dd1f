"""What particular layers and whole models remember between calls; of any block: test_memo."""

from __future__ import annotations

import os
import signal

import pytest
import timm
import torch
from timm.layers import GroupNormAct, StdConv2d
from timm.models import beit, eva, resnetv2
from timm.models.vision_transformer import Block
from torch import nn

from tests.layers.test_memo import C, by_timm, call, replays
from vitfast.engine import memo as engine_memo
from vitfast.swap import swap

pytestmark = pytest.mark.usefixtures("needs_native")


def test_what_a_plan_computes_counts_at_once(lively):
    block = beit.Block(C, 3, qkv_bias=True, init_values=0.1, window_size=(3, 3))
    module, x = lively(block).eval(), torch.randn(2, 10, C)
    swap(module)
    call(module, x, 3)
    with torch.no_grad():
        module.attn.q_bias.add_(1)
    torch.testing.assert_close(call(module, x).double(), by_timm(module, x), rtol=1e-4, atol=1e-4)


BIASES = {
    "in place": lambda bias: bias.detach().add_(1.0),
    "past torch": lambda bias: bias.data.add_(1.0),
    "moved": lambda bias: setattr(bias, "data", bias.data + 1.0),
}


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias"])
@pytest.mark.parametrize("how", BIASES)
@pytest.mark.parametrize("kind", ["beit", "eva"])
def test_biases_that_timm_joins_in_each_call(kind, how, name, lively):
    if kind == "beit":
        block = beit.Block(C, 3, qkv_bias=True, init_values=0.1)
    else:
        block = eva.EvaBlock(C, 3, qkv_fused=True)
    module, x = lively(block).eval(), torch.randn(2, 10, C)
    swap(module)
    call(module, x, 4)
    assert replays(module)
    before = call(module, x)
    BIASES[how](getattr(module.attn, name))
    found = call(module, x)
    torch.testing.assert_close(found.double(), by_timm(module, x), rtol=1e-4, atol=1e-4)
    if name != "k_bias":  # which all keys have alike
        assert (found - before).abs().max() > 1e-3


def test_a_frozen_bottleneck_thaws(lively):
    module = lively(resnetv2.Bottleneck(128, conv_layer=StdConv2d, norm_layer=GroupNormAct)).eval()
    swap(module)
    module.requires_grad_(False)
    x = torch.randn(1, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        assert not module(x).requires_grad
    module.conv2.weight.requires_grad_()
    assert module(x).requires_grad


def test_downsampling(lively):
    module = nn.Sequential(timm.layers.LayerNorm2d(C), nn.Conv2d(C, 2 * C, 2, 2))
    swap(lively(module).eval())
    x = torch.randn(2, C, 14, 14).contiguous(memory_format=torch.channels_last)
    first = call(module, x)
    for one in (call(module, x), call(module, x)):
        torch.testing.assert_close(one, first, rtol=0, atol=0)
    assert replays(module)
    for change in (
        lambda: module[1].weight.data.mul_(2),
        lambda: setattr(module[1], "bias", None),
        lambda: setattr(module[1], "stride", (1, 1)),
    ):
        change()
        found = call(module, x)
        torch.testing.assert_close(found.double(), by_timm(module, x), rtol=1e-4, atol=1e-4)


def test_drop_path_in_training(lively):
    module = lively(Block(C, 3, drop_path=0.5))
    swap(module)
    x = torch.randn(64, 10, C)
    module.eval()
    still = call(module, x, 3)
    module.train()
    assert (call(module, x) != still).any()
    module.eval()
    torch.testing.assert_close(call(module, x), still, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swinv2_cr_tiny_ns_224"])
def test_a_model_in_inference_mode(name):
    size = 64 if name.startswith("vit") else 224
    model = timm.create_model(name, img_size=size, num_classes=3).eval()
    swap(model)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        found = [model(x) for _ in range(4)]
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), found[0], rtol=1e-5, atol=1e-5)


def wide_vit(width=192):
    """A swapped block with weights too large to be read whole every time."""
    module = Block(width, 3, qkv_bias=True).eval()
    swap(module)
    return module, torch.randn(2, 10, width)


def test_an_edit_behind_pytorch_is_found_by_name_within_32_calls():
    module, x = wide_vit()
    call(module, x, 4)
    module.mlp.fc1.weight.detach().numpy()[300, 7] = 9.0
    with pytest.warns(UserWarning, match=r"Block\.mlp\.fc1\.weight was edited"):
        found = call(module, x, 32)
    assert (found - by_timm(module, x)).abs().max() < 1e-4
    assert (call(module, x[:1]) - by_timm(module, x[:1])).abs().max() < 1e-4


def test_a_new_kind_of_input_is_not_served_what_was_packed_before_an_edit():
    module, x = wide_vit()
    call(module, x, 4)
    module.attn.qkv.weight.detach().numpy()[300, 7] = 9.0
    with pytest.warns(UserWarning, match="was edited"):
        found = call(module, x[:, :7])
    assert (found - by_timm(module, x[:, :7])).abs().max() < 1e-4


def test_a_weight_written_while_it_is_packed_is_not_kept(monkeypatch):
    module, x = wide_vit()
    made = engine_memo._Prepared

    def written_meanwhile(value):
        with torch.no_grad():
            module.mlp.fc2.weight.mul_(2)
        monkeypatch.setattr(engine_memo, "_Prepared", made)
        return made(value)

    monkeypatch.setattr(engine_memo, "_Prepared", written_meanwhile)
    call(module, x)
    assert (call(module, x, 4) - by_timm(module, x)).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_of_one_thread_runs_a_warm_block():
    module, x = wide_vit(384)  # wide enough for the parent to look at a weight on several threads
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = call(module, x, 4)
    finally:
        torch.set_num_threads(before)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for threads it does not have
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(call(module, x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
