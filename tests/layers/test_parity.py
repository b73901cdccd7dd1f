"""Every layer and option against timm: outputs and gradients, training and inference."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers as tl
import torch
from timm.models import beit, eva, vision_transformer_relpos
from timm.models.vision_transformer import Block
from torch import nn

from vitfast.engine import patches as engine
from vitfast.ops.patch_embed import native as patch_embed
from vitfast.runtime import native
from vitfast.swap import swap

C, HEADS, N = 48, 3, 10
DIM = C // HEADS


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, N, C)))


def rope_embed(
    *leading: int, tokens: int = N - 1, dim: int = DIM, half: bool = False
) -> torch.Tensor:
    angles = torch.randn(*leading, tokens, dim // 2)
    angles = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


NORMS = {
    "layer": tl.LayerNorm(C),
    "layer_eps": tl.LayerNorm(C, eps=1e-2),
    "layer_plain": tl.LayerNorm(C, affine=False),
    "torch_layer": nn.LayerNorm(C),
    "torch_layer_no_bias": nn.LayerNorm(C, bias=False),
    "rms": tl.RmsNorm(C),
    "rms_eps": tl.RmsNorm(C, eps=1e-2),
    "rms_plain": tl.RmsNorm(C, affine=False),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(2, N, C), (C,), (2, 3, 5, C)], ids=str)
def test_norm(parity, lively, name, shape):
    parity(lively(NORMS[name]), tokens(*shape))


MLPS = {
    "gelu": partial(tl.Mlp, C, 4 * C),
    "timm_gelu": partial(tl.Mlp, C, act_layer=tl.get_act_layer("gelu")),
    "gelu_tanh": partial(tl.Mlp, C, act_layer=tl.get_act_layer("gelu_tanh")),
    "torch_gelu_tanh": partial(tl.Mlp, C, act_layer=partial(nn.GELU, approximate="tanh")),
    "quick_gelu": partial(tl.Mlp, C, act_layer=tl.get_act_layer("quick_gelu")),
    "silu": partial(tl.Mlp, C, act_layer=nn.SiLU),
    "relu": partial(tl.Mlp, C, act_layer=nn.ReLU),
    "sigmoid": partial(tl.Mlp, C, act_layer=nn.Sigmoid),
    "no_act": partial(tl.Mlp, C, act_layer=nn.Identity),
    "norm": partial(tl.Mlp, C, 4 * C, norm_layer=tl.LayerNorm),
    "rms_norm": partial(tl.Mlp, C, norm_layer=tl.RmsNorm),
    "no_bias": partial(tl.Mlp, C, bias=False),
    "bias_pair": partial(tl.Mlp, C, bias=(True, False)),
    "sizes": partial(tl.Mlp, C, 31, 17),
    "swiglu_packed": partial(tl.GluMlp, C, 4 * C, act_layer=nn.SiLU, gate_last=False),
    "geglu": partial(tl.GluMlp, C, 4 * C, act_layer=nn.GELU),
    "glu": partial(tl.GluMlp, C, 62),
    "glu_norm": partial(tl.GluMlp, C, act_layer=nn.SiLU, norm_layer=tl.LayerNorm, bias=False),
    "swiglu": partial(tl.SwiGLU, C, 2 * C),
    "swiglu_norm": partial(tl.SwiGLU, C, norm_layer=tl.LayerNorm),
    "swiglu_align": partial(tl.SwiGLU, C, 50, align_to=16, bias=False),
}


@pytest.mark.parametrize("name", MLPS)
def test_mlp(parity, lively, name):
    parity(lively(MLPS[name]()), tokens())


def test_mlp_of_other_ranks(parity, lively):
    for shape in ((C,), (5, C), (2, 3, 4, C)):
        parity(lively(tl.Mlp(C)), tokens(*shape))


ATTENTIONS = {
    "plain": partial(tl.Attention, C, HEADS),
    "qkv_bias": partial(tl.Attention, C, HEADS, qkv_bias=True),
    "qk_norm": partial(tl.Attention, C, HEADS, qk_norm=True, norm_layer=tl.LayerNorm),
    "qk_norm_rms": partial(tl.Attention, C, HEADS, qk_norm=True, norm_layer=tl.RmsNorm),
    "scale_norm": partial(tl.Attention, C, HEADS, scale_norm=True, norm_layer=tl.LayerNorm),
    "head_dim": partial(tl.Attention, C, HEADS, attn_head_dim=24, dim_out=32, qkv_bias=True),
    "no_proj_bias": partial(tl.Attention, C, HEADS, proj_bias=False),
    "head_dim_72": partial(tl.Attention, 144, 2, qkv_bias=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(parity, lively, name):
    module = lively(ATTENTIONS[name]())
    parity(module, tokens(2, N, module.qkv.in_features))


MASKS = {
    "bool_2d": torch.rand(N, N, generator=torch.Generator().manual_seed(0)) > 0.3,
    "bool_keys": torch.arange(N).expand(2, 1, 1, N) < torch.tensor([7, 10]).view(2, 1, 1, 1),
    "float_3d": torch.randn(HEADS, N, N, generator=torch.Generator().manual_seed(0)),
    "float_4d": torch.randn(2, 1, N, N, generator=torch.Generator().manual_seed(0)),
    "finfo_min": torch.zeros(2, 1, N, N).index_fill_(3, torch.tensor([8, 9]), -3.4028e38),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_masks(parity, lively, name):
    parity(lively(tl.Attention(C, HEADS)), tokens(), attn_mask=MASKS[name])
    parity(lively(Block(C, HEADS)), tokens(), attn_mask=MASKS[name])


def test_attention_causal(parity, lively):
    parity(lively(tl.Attention(C, HEADS)), tokens(), is_causal=True)
    parity(lively(Block(C, HEADS)), tokens(), is_causal=True)


ROPES = {
    "shared": rope_embed(),
    "heads": rope_embed(HEADS),
    "batch": rope_embed(2, 1),
    "batch_and_heads": rope_embed(2, HEADS),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("kind", ["rope", "rope_split", "eva", "eva_split"])
def test_rotary_attention(parity, lively, name, kind):
    module = {
        "rope": partial(tl.AttentionRope, C, HEADS),
        "rope_split": partial(tl.AttentionRope, C, HEADS, qkv_fused=False),
        "eva": partial(eva.EvaAttention, C, HEADS, scale_norm=False),
        "eva_split": partial(eva.EvaAttention, C, HEADS, qkv_fused=False, norm_layer=tl.LayerNorm),
    }[kind]()
    parity(lively(module), tokens(), rope=ROPES[name])


@pytest.mark.parametrize("kind", [tl.AttentionRope, eva.EvaAttention])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rotary_half_with_norm_and_mask(parity, lively, kind, prefix):
    module = kind(
        C, HEADS, num_prefix_tokens=prefix, rotate_half=True, qk_norm=True, scale_norm=True,
        norm_layer=tl.LayerNorm,
    )  # fmt: skip
    parity(
        lively(module),
        tokens(),
        rope=rope_embed(tokens=N - prefix, half=True),
        attn_mask=MASKS["bool_keys"],
    )


@pytest.mark.timm("1.0.29")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_attention(parity, lively, kv_heads):
    options = dict(num_kv_heads=kv_heads, qkv_fused=False, qk_norm=True, norm_layer=tl.RmsNorm)
    x, rope = tokens(2, N, 32), rope_embed(dim=8)
    parity(lively(tl.AttentionRope(32, 4, **options)), x, rope=rope)
    block = eva.EvaBlock(32, 4, attn_type="rope", num_kv_heads=kv_heads, qkv_fused=False)
    parity(lively(block).eval(), x, rope=rope)


def test_eva_attention_biases(parity, lively):
    options = dict(scale_norm=False)
    parity(lively(eva.EvaAttention(C, HEADS, qkv_bias=False, **options)), tokens())
    parity(lively(eva.EvaAttention(C, HEADS, qkv_bias_separate=True, **options)), tokens())


BEIT_ATTENTIONS = {
    "plain": partial(beit.Attention, C, HEADS),
    "bias": partial(beit.Attention, C, HEADS, qkv_bias=True),
    "bias_separate": partial(beit.Attention, C, HEADS, qkv_bias=True, qkv_bias_separate=True),
    "window": partial(beit.Attention, C, HEADS, qkv_bias=True, window_size=(3, 3)),
}


@pytest.mark.parametrize("name", BEIT_ATTENTIONS)
@pytest.mark.parametrize("shared", [None, (HEADS, N, N), (1, 1, N, N)], ids=str)
def test_beit_attention(parity, lively, name, shared):
    bias = None if shared is None else torch.randn(shared)
    parity(lively(BEIT_ATTENTIONS[name]()), tokens(), shared_rel_pos_bias=bias)


REL_POS = {
    "none": None,
    "bias": partial(tl.RelPosBias, window_size=(3, 3), prefix_tokens=1),
    "mlp": partial(tl.RelPosMlp, window_size=(3, 3), prefix_tokens=1),
    "mlp_swin": partial(tl.RelPosMlp, window_size=(3, 3), prefix_tokens=1, mode="swin"),
}


@pytest.mark.parametrize("name", REL_POS)
def test_rel_pos_attention(parity, lively, name):
    module = vision_transformer_relpos.RelPosAttention(C, HEADS, rel_pos_cls=REL_POS[name])
    parity(lively(module).eval(), tokens())
    if name == "none":
        parity(module, tokens(), shared_rel_pos=torch.randn(1, HEADS, N, N))


BLOCKS = {
    "vit": partial(Block, C, HEADS, qkv_bias=True),
    "vit_layer_scale": partial(Block, C, HEADS, init_values=0.1),
    "vit_drop_path": partial(Block, C, HEADS, init_values=0.1, drop_path=0.5),
    "vit_drop_path_plain": partial(Block, C, HEADS, drop_path=0.5),
    "vit_rms_swiglu": partial(
        Block, C, HEADS, norm_layer=tl.RmsNorm, mlp_layer=tl.SwiGLU, proj_bias=False, qk_norm=True,
    ),
    "vit_scale_norms": partial(Block, C, HEADS, scale_attn_norm=True, scale_mlp_norm=True),
    "vit_torch_norm": partial(Block, C, HEADS, norm_layer=nn.LayerNorm),
    "eva": partial(eva.EvaBlock, C, HEADS),
    "eva_gamma": partial(eva.EvaBlock, C, HEADS, init_values=0.1, drop_path=0.5),
    "eva_attn_only_layer_scale": partial(
        eva.EvaBlock, C, HEADS, init_values=0.1, attn_only_layer_scale=True
    ),
    "eva_swiglu": partial(eva.EvaBlock, C, HEADS, swiglu_mlp=True),
    "eva_swiglu_norm": partial(
        eva.EvaBlock, C, HEADS, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True,
        qkv_fused=False,
    ),
    "eva_rope": partial(eva.EvaBlock, C, HEADS, attn_type="rope", rotate_half=True),
    "beit": partial(beit.Block, C, HEADS, qkv_bias=True, init_values=0.1, window_size=(3, 3)),
    "beit_plain": partial(beit.Block, C, HEADS, swiglu_mlp=True, drop_path=0.5),
    "rel_pos": partial(
        vision_transformer_relpos.RelPosBlock, C, HEADS, init_values=0.1, drop_path=0.5,
        rel_pos_cls=REL_POS["bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(parity, lively, name, training):
    module = lively(BLOCKS[name]()).train(training)
    more = {}
    if name.startswith("eva"):
        more["rope"] = rope_embed(half="rope" in name)
    parity(module, tokens(4, N, C), **more)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_autocast(parity, lively, name, training):
    module = lively(BLOCKS[name]()).train(training)
    more = {"rope": rope_embed()} if name.startswith("eva") else {}
    parity(module, tokens(4, N, C), autocast=torch.bfloat16, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vit_layer_scale", "eva_swiglu_norm", "beit", "rel_pos"])
def test_block_dtypes(parity, lively, name, dtype):
    parity(lively(BLOCKS[name]()).to(dtype).eval(), tokens(4, N, C).to(dtype))


@pytest.mark.parametrize("name", ["vit_layer_scale", "vit_rms_swiglu", "eva_swiglu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2100), (7, 300)], ids=str)
def test_block_sizes(parity, lively, name, shape):
    """From one token to several chunks of rows, the last one short."""
    torch.set_num_threads(2)
    parity(lively(BLOCKS[name]()).eval(), tokens(*shape, C), backward=False)


@pytest.mark.skipif(bool(native.reasons()), reason="; ".join(native.reasons()))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_in_inference_leaves_the_ops(lively, monkeypatch, name, autocast):
    """The comparisons above are of the direct kernels: without autograd no op is called."""
    module = lively(BLOCKS[name]()).eval()
    swap(module)
    x = tokens()
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)):
        module(x)
        monkeypatch.setattr("vitfast.blocks.transformer._differentiable", None)
        module(x)
        with torch.enable_grad(), pytest.raises(TypeError, match="NoneType"):
            module(x)


def test_empty_batch(parity, lively):
    for name in ("vit", "rel_pos"):
        block = lively(BLOCKS[name]()).eval()
        swapped = parity(block, tokens(2, N, C), backward=False)
        empty = tokens(0, N, C)
        assert swapped(empty).shape == block(empty).shape == empty.shape
        swapped(empty).sum().backward()


def test_strided_input(parity, lively):
    x = tokens(2 * N, 2, C).transpose(0, 1)[:, ::2]
    parity(lively(BLOCKS["vit_layer_scale"]()).eval(), x)


PATCHES = {
    "flat": {},
    "no_bias": dict(bias=False),
    "norm": dict(norm_layer=tl.LayerNorm),
    "nhwc": dict(output_fmt="NHWC"),
    "nlc": dict(output_fmt="NLC"),
    "any_size": dict(img_size=None),
    "lenient": dict(strict_img_size=False),
    "padded": dict(strict_img_size=False, dynamic_img_pad=True),
    "channels": dict(in_chans=5),
    "patch_14": dict(patch_size=14, img_size=28),
    "patch_4": dict(patch_size=4),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PATCHES)
def test_patch_embed(parity, lively, name, layout):
    options = dict(img_size=16, patch_size=8, embed_dim=C) | PATCHES[name]
    module = lively(tl.PatchEmbed(**options))
    sizes = {"any_size": (19, 30), "lenient": (24, 8), "padded": (13, 22)}
    size = sizes.get(name, (options["img_size"],) * 2)
    x = torch.randn(2, options.get("in_chans", 3), *size).to(memory_format=layout)
    parity(module, x)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [tl.LayerNorm, tl.RmsNorm])
@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
def test_patches_are_normalised_a_stretch_at_a_time(
    parity, lively, monkeypatch, layout, norm, autocast
):
    monkeypatch.setattr(patch_embed, "_STRETCH_BYTES", 64 * 48 * 4)
    calls = []
    embed = engine.embed
    monkeypatch.setattr(engine, "embed", lambda *args: calls.append(embed(*args)) or calls[-1])
    made = tl.PatchEmbed(60, 4, embed_dim=C, norm_layer=norm, output_fmt=layout)
    parity(lively(made), torch.randn(3, 3, 60, 60), autocast=autocast)
    assert {call.shape for call in calls} == {(3, 225, C)}


@pytest.mark.parametrize("options", [dict(flatten=False), dict(output_fmt="NCL")], ids=str)
def test_patch_embed_in_other_layouts_is_timm(parity, options):
    parity(tl.PatchEmbed(16, 8, embed_dim=C, **options), torch.randn(2, 3, 16, 16), fused=False)


def test_patch_embed_refuses_what_timm_refuses():
    module = tl.PatchEmbed(16, 8, embed_dim=C)
    swap(module)
    with pytest.raises(AssertionError, match="Input height"):
        module(torch.randn(2, 3, 24, 16))
    module.strict_img_size = False
    with pytest.raises(AssertionError, match="divisible by patch size"):
        module(torch.randn(2, 3, 20, 16))
