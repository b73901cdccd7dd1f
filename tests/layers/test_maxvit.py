"""MaxViT's partition attention beside timm's, windows and grids, and its ConvNeXt block."""

from __future__ import annotations

import copy
import gc

import pytest
import timm
import torch
from timm.models import maxxvit

from vitfast import layers, restore, swap
from vitfast.engine import rows as by_rows
from vitfast.layers.reading.position import _KEPT

C, DIM = 32, 16
CONFIGS = {
    "bias": dict(rel_pos_type="bias"),
    "bias_tf": dict(rel_pos_type="bias_tf", head_first=False),
    "mlp": dict(rel_pos_type="mlp", rel_pos_dim=24),
    "no_bias": dict(rel_pos_type=""),
    "layer_scale": dict(rel_pos_type="bias", init_values=1e-6),
    "no_attn_bias": dict(rel_pos_type="bias_tf", attn_bias=False),
    "tanh": dict(rel_pos_type="bias", act_layer="gelu_tanh", norm_eps=1e-3),
}
kinds = pytest.mark.parametrize("kind", ["block", "grid"])


def config(name: str, window=(4, 3), **more) -> maxxvit.MaxxVitTransformerCfg:
    options = dict(dim_head=DIM, window_size=window, grid_size=window)
    return maxxvit.MaxxVitTransformerCfg(**options | CONFIGS[name] | more)


def block(kind: str, name: str, window=(4, 3), drop_path=0.0, **more) -> torch.nn.Module:
    return maxxvit.PartitionAttentionCl(C, kind, config(name, window, **more), drop_path)


def image(batch: int = 2, size=(12, 9)) -> torch.Tensor:
    """Channels-last, as a view of what a convolution gives."""
    return torch.randn(batch, C, *size).permute(0, 2, 3, 1)


@kinds
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CONFIGS)
def test_block(parity, lively, kind, name, training, autocast):
    module = lively(block(kind, name, drop_path=0.5 if training else 0.0)).train(training)
    if name == "mlp":
        module.attn.rel_pos.mlp.eval()  # its dropout has a test of its own
        # Softmax does not see it: two gradients that are nothing but rounding.
        module.attn.rel_pos.mlp.fc2.bias.requires_grad_(False)
    found = parity(module, image(4), autocast=autocast)
    assert type(found) is layers.MaxxVitPartitionAttentionCl


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bias_tf", "mlp"])
def test_block_dtypes(parity, lively, kind, name, dtype):
    parity(lively(block(kind, name)).to(dtype).eval(), image().to(dtype))


@kinds
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [50, 130, 300])
@pytest.mark.parametrize("size", [(28, 15), (20, 24), (24, 18)], ids=str)
def test_stripes(parity, lively, monkeypatch, kind, size, chunk, autocast):
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    module = lively(block(kind, "bias")).eval()
    parity(module, image(size=size), autocast=autocast, backward=False)


@kinds
def test_a_size_that_windows_do_not_divide_is_refused_as_by_timm(kind):
    module = block(kind, "bias")
    swap(module)
    with pytest.raises(AssertionError, match="must be divisible"):
        module(image(size=(12, 10)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention(parity, lively, name, fused):
    options = config(name)
    bias = maxxvit.get_rel_pos_cls(options, (4, 3))
    module = lively(
        maxxvit.AttentionCl(C, 24, DIM, head_first=options.head_first, rel_pos_cls=bias)
    ).eval()
    module.fused_attn = fused
    assert type(parity(module, torch.randn(6, 4, 3, C))) is layers.MaxxVitAttentionCl


def test_attention_with_a_shared_bias_is_timm(lively):
    theirs = lively(maxxvit.AttentionCl(C, dim_head=DIM))
    ours = copy.deepcopy(theirs)
    swap(ours)
    x, shared = torch.randn(6, 4, 3, C), torch.randn(1, 2, 12, 12)
    assert torch.equal(ours(x, shared), theirs(x, shared))
    rows = x.flatten(1, 2)
    assert torch.equal(ours(rows), theirs(rows))


@kinds
@pytest.mark.parametrize(
    "change",
    [dict(), dict(attn_drop=0.5), dict(proj_drop=0.5)],
    ids=["position_mlp", "attn", "proj"],
)
def test_dropout_draws_as_timms(lively, kind, change):
    theirs = lively(block(kind, "mlp", drop_path=0.5, **change)).train()
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = image(8)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("child", ["attn.rel_pos", "attn.rel_pos.mlp.fc2", "attn.qkv", "ls1"])
def test_hooks_are_called(lively, child):
    theirs = lively(block("grid", "mlp", init_values=0.1)).eval()
    theirs.attn.fused_attn = False
    ours = copy.deepcopy(theirs)
    swap(ours)
    calls = []
    x = image()
    with torch.no_grad():
        ours(x)
        ours.get_submodule(child).register_forward_hook(lambda *_: calls.append(1))
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


@kinds
@pytest.mark.parametrize(
    "name, parameter",
    [("bias", "attn.rel_pos.relative_position_bias_table"),
     ("bias_tf", "attn.rel_pos.relative_position_bias_table"),
     ("mlp", "attn.rel_pos.mlp.fc1.weight"), ("mlp", "attn.rel_pos.mlp.fc1.bias")],
)  # fmt: skip
def test_a_changed_parameter_counts_at_once(lively, kind, name, parameter):
    module = lively(block(kind, name)).eval()
    swap(module)
    x = image()
    with torch.no_grad():
        before = module(x)
        module.get_parameter(parameter).normal_(std=4)
        after = module(x)
        restore(module)
        torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-5)
    assert (before - after).abs().max() > 1e-2


@kinds
@pytest.mark.parametrize("name", ["bias", "bias_tf", "mlp"])
def test_a_partition_set_after_the_swap(lively, kind, name):
    theirs = lively(block(kind, name)).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    with torch.no_grad():
        ours(image())
        for module in (ours, theirs):
            module.set_partition_size((2, 5))
        x = image(size=(6, 10))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_positions_are_kept_without_autograd_only(lively):
    module = lively(block("block", "mlp")).eval()
    swap(module)
    gc.collect()
    _KEPT.clear()
    with torch.no_grad():
        first = module.plan(module).attn.table
        assert module.plan(module).attn.table is first
    assert module.plan(module).attn.table.requires_grad
    del module
    gc.collect()
    assert not _KEPT


def test_positions_by_the_mode_of_swin(lively):
    """`RelPosMlp` has an activation and a gain there."""
    positions = timm.layers.RelPosMlp((4, 3), 2, 24, mode="swin")
    module = lively(maxxvit.AttentionCl(C, dim_head=DIM)).eval()
    module.rel_pos = positions.eval()
    ours = copy.deepcopy(module)
    swap(ours)
    x = torch.randn(6, 4, 3, C)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), module(x), rtol=1e-4, atol=1e-5)


MODEL = dict(embed_dim=(32, 64), depths=(1, 1), num_classes=10, stem_width=16)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224"])
def test_model(parity, lively, name, autocast):
    made = timm.create_model(name, **MODEL, block_type=("M", "M"), img_size=64)
    module = lively(made).eval()
    found = parity(module, torch.randn(2, 3, 64, 64), autocast=autocast, backward=False)
    wanted = [type(m) for m in found.modules() if isinstance(m, maxxvit.PartitionAttentionCl)]
    assert wanted == [layers.MaxxVitPartitionAttentionCl] * 4


def test_one_graph(lively, one_graph):
    made = timm.create_model("maxvit_rmlp_pico_rw_256", **MODEL, block_type=("M", "M"), img_size=64)
    module = lively(made).eval()
    swap(module)
    text = one_graph(module, torch.randn(1, 3, 64, 64))
    assert text.count("vitfast.window_attention.default") == 4


CONVNEXT = {
    "conv": dict(),
    "linear": dict(conv_mlp=False, norm_layer="layernorm"),
    "layer_scale": dict(init_values=0.1),
    "linear_scale": dict(init_values=0.1, conv_mlp=False, norm_layer="layernorm"),
    "no_bias": dict(output_bias=False),
    "drop_path": dict(drop_path=0.5),
    "kernel_3": dict(kernel_size=3),
    "tanh": dict(act_layer="gelu_tanh", expand_ratio=2),
}


def convnext(name: str, **more) -> torch.nn.Module:
    options = dict(block_type="convnext", norm_layer="layernorm2d", act_layer="gelu")
    options |= CONVNEXT[name] | more
    named = ("conv_mlp", "drop_path", "kernel_size", "stride", "dilation", "out_chs")
    direct = {n: options.pop(n) for n in named if n in options}
    return maxxvit.ConvNeXtBlock(C, cfg=maxxvit.MaxxVitConvCfg(**options), **direct)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CONVNEXT)
def test_convnext_block(parity, lively, name, training, autocast):
    module = lively(convnext(name)).train(training)
    x = torch.randn(3, C, 9, 11).to(memory_format=torch.channels_last)
    found = parity(module, x, autocast=autocast)
    assert type(found) is layers.MaxxVitConvNeXtBlock
    parity(module, x.contiguous(), autocast=autocast, backward=False)


def with_norm_in_mlp(module: torch.nn.Module) -> None:
    module.mlp.norm = timm.layers.LayerNorm2d(len(module.mlp.fc1.weight))


def with_dropout(module: torch.nn.Module) -> None:
    module.mlp.drop.p = 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(stride=2), "shortcut"),
        (dict(stride=2, stride_mode="dw"), "shortcut"),
        (dict(out_chs=2 * C), "shortcut"),
        (dict(dilation=(1, 2)), "conv_dw"),
        (dict(norm_layer="batchnorm2d"), "BatchNorm2d"),
        (dict(act_layer="mish"), "Mish"),
    ],
    ids=str,
)
def test_other_convnext_blocks_are_left_to_timm(lively, options, reason):
    theirs = lively(convnext("conv", **options))
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    assert report.counts["blocks_swapped"] == 0
    assert reason in report.skipped[0].reason


def test_a_convnext_block_with_a_norm_in_its_mlp_is_left_to_timm():
    module = convnext("conv")
    with_norm_in_mlp(module)
    report = swap(module)
    assert report.counts["blocks_swapped"] == 0
    assert "norm before the activation" in report.skipped[0].reason


def test_dropout_in_the_mlp_of_a_convnext_block_draws_as_timms(lively):
    theirs = lively(convnext("conv")).train()
    with_dropout(theirs)
    ours = copy.deepcopy(theirs)
    assert "drops 0.5" in swap(ours).swapped[0].note
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(torch.ones(2, C, 8, 8)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
