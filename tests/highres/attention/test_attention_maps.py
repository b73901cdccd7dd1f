"""Maps of attention beside the dense matrices of timm's own forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitfast
from vitfast.errors import InputValueError
from vitfast.highres import attention_map
from vitfast.highres.attention import queries_keys, rows

SMALL = dict(embed_dim=96, num_heads=3)
MODELS = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": dict(SMALL, patch_size=16),
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch32_plus_256": dict(SMALL, patch_size=16),
    "vit_base_patch16_xp_224": SMALL,  # parallel scaling blocks, q/k norm
    "vit_small_patch16_dinov3": SMALL,  # rope, registers
    "vit_small_patch16_dinov3_qkvb": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,  # rope by layer and head
    "vit_pe_core_tiny_patch16_384": SMALL,
    "eva02_tiny_patch14_224": dict(SMALL, patch_size=16),
    "eva02_base_patch14_224": dict(SMALL, patch_size=16),  # q, k and v apart
    "eva02_enormous_patch14_clip_224": dict(SMALL, patch_size=16),  # norms last
    "beit_base_patch16_224": SMALL,
    "beitv2_base_patch16_224": dict(SMALL, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "vit_relpos_base_patch16_clsgap_224": SMALL,
    "vit_relpos_medium_patch16_rpn_224": SMALL,
    "vit_srelpos_small_patch16_224": SMALL,
    "naflexvit_base_patch16_gap": SMALL,
}


def everything(model: nn.Module, image: torch.Tensor, zoo, tokens: int) -> list[torch.Tensor]:
    """The dense matrices of all layers, made of maps of all tokens."""
    maps = attention_map(model, image, "all", list(range(tokens)), "each")
    return [zoo.joined(found) for found in maps]


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_rows_of_the_dense_attention(name, zoo):
    model, image = zoo.make(name, **MODELS[name]), zoo.noise()
    expected = zoo.dense(model, image)
    assert len(expected) == 2 and expected[0].amax() > 2 / expected[0].shape[-1]  # not uniform
    for found, right in zip(
        everything(model, image, zoo, right_tokens := expected[0].shape[-1]), expected, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    vitfast.swap(model)
    for found, right in zip(everything(model, image, zoo, right_tokens), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_hybrid(swapped, zoo):
    size = (64, 96)
    model = zoo.make("vit_tiny_r_s16_p8_224", size, patch_size=4)
    image = zoo.noise(size=size)
    expected = zoo.dense(model, image)
    if swapped:
        vitfast.swap(model)
    found = attention_map(model, image, -1, "cls", "each")
    assert found.patches.shape == (2, 3, 1, 4, 6)
    torch.testing.assert_close(zoo.joined(found), expected[1][:, :, :1], rtol=0, atol=1e-5)


def test_blocks_of_many_branches_are_layers_each(zoo):
    from timm.models.vision_transformer import ParallelThingsBlock

    model = zoo.make("vit_tiny_patch16_224", block_fn=ParallelThingsBlock)
    expected = zoo.dense(model, zoo.noise())
    found = attention_map(model, zoo.noise(), "all", [0, 3], "each")
    assert len(found) == len(expected) == 4
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(zoo.joined(one), right[:, :, [0, 3]], rtol=0, atol=1e-5)


def test_grouped_queries_and_half_rotations(zoo):
    model = zoo.make(
        "vit_small_patch16_dinov3",
        embed_dim=128,
        num_heads=4,
        attn_type="rope",
        rope_rotate_half=True,
        qk_norm=True,
    )
    for block in model.blocks:
        attn, width = block.attn, 128
        attn.num_kv_heads, attn.num_kv_groups, attn.qkv = 2, 2, None
        attn.q_proj = nn.Linear(width, width)
        attn.k_proj, attn.v_proj = nn.Linear(width, 64), nn.Linear(width, 64)
    image = zoo.noise()
    expected = zoo.dense(model, image)
    for found, right in zip(
        everything(model, image, zoo, expected[0].shape[-1]), expected, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


# ---- queries, heads, layers ---------------------------------------------------------------------


def test_what_queries_mean(zoo):
    model, image = (
        zoo.make("vit_small_patch14_reg4_dinov2", **MODELS["vit_small_patch14_reg4_dinov2"]),
        zoo.noise(),
    )
    dense = zoo.dense(model, image)[1]  # 1 class token, 4 registers, 3 x 4 patches

    def check(query, expected: torch.Tensor) -> None:
        found = attention_map(model, image, -1, query, "each")
        assert found.patches.shape == (2, 3, expected.shape[2], 3, 4)
        assert found.prefix.shape == (2, 3, expected.shape[2], 5)
        torch.testing.assert_close(zoo.joined(found), expected, rtol=0, atol=1e-5)

    check("cls", dense[:, :, [0]])
    check("registers", dense[:, :, 1:5])
    check("mean", dense[:, :, 5:].mean(2, keepdim=True))
    check(7, dense[:, :, [7]])
    check([7, 0], dense[:, :, [7, 0]])
    check(np.array([7, 2]), dense[:, :, [7, 2]])
    check(torch.tensor([16]), dense[:, :, [16]])
    check((1, 2), dense[:, :, [5 + 4 + 2]])
    check([(1, 2), (2, 3)], dense[:, :, [5 + 4 + 2, 5 + 8 + 3]])
    check(torch.tensor([[0, 1]]), dense[:, :, [6]])


def test_the_tokens_of_a_distilled_model(zoo):
    model, image = zoo.make("deit_tiny_distilled_patch16_224"), zoo.noise()
    dense = zoo.dense(model, image)[1]
    for query, token in (("cls", 0), ("dist", 1)):
        found = attention_map(model, image, query=query, head="each")
        torch.testing.assert_close(zoo.joined(found), dense[:, :, [token]], rtol=0, atol=1e-5)


def test_heads_and_layers(zoo):
    model, image = zoo.make("vit_tiny_patch16_224", depth=3), zoo.noise()
    dense = [attention[:, :, :1] for attention in zoo.dense(model, image)]
    close = dict(rtol=0, atol=1e-5)
    found = attention_map(model, image)
    assert (found.layer, found.patches.shape) == (2, (2, 1, 1, 3, 4))
    torch.testing.assert_close(zoo.joined(found), dense[2].mean(1, keepdim=True), **close)
    for head in (1, -2):
        one = attention_map(model, image, 0, head=head)
        torch.testing.assert_close(zoo.joined(one), dense[0][:, 1:2], **close)
    both = attention_map(model, image, [2, -3], head="each")
    assert [m.layer for m in both] == [2, 0]
    torch.testing.assert_close(zoo.joined(both[0]), dense[2], **close)
    torch.testing.assert_close(zoo.joined(both[1]), dense[0], **close)
    assert [m.layer for m in attention_map(model, image, "all")] == [0, 1, 2]


def test_an_early_layer_runs_no_later_one(zoo, monkeypatch):
    model = zoo.make("vit_tiny_patch16_224", depth=3)
    ran = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    attention_map(model, zoo.noise(), 1)
    assert ran == [0]


def test_many_queries_go_a_few_at_a_time(zoo, monkeypatch):
    model, image = zoo.make("beit_base_patch16_224", **SMALL), zoo.noise()
    expected = zoo.dense(model, image)[1]
    for module in (queries_keys, rows):
        monkeypatch.setattr(module, "TOKENS", 5)
    monkeypatch.setattr(rows, "SCORES", 4 * 2 * 3 * 13 * 4)
    monkeypatch.setattr(rows, "QUERIES", 3)
    found = attention_map(model, image, -1, list(range(13)), "each")
    torch.testing.assert_close(zoo.joined(found), expected, rtol=0, atol=1e-5)
    found = attention_map(model, image, -1, "mean", "each")
    right = expected[:, :, 1:].mean(2, keepdim=True)
    torch.testing.assert_close(zoo.joined(found), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_map_of_a_pool(swapped, zoo):
    model, image = zoo.make("vit_base_patch16_siglip_224", **SMALL), zoo.noise()
    seen = []
    model.attn_pool.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(image)
        pool = model.attn_pool
        q = pool.q(pool.latent).view(1, 1, 3, 32).transpose(1, 2)
        k = pool.kv(seen[0])[..., :96].unflatten(-1, (3, 32)).transpose(1, 2)
        expected = (q @ k.transpose(-2, -1) * 32**-0.5).softmax(-1)
    if swapped:
        vitfast.swap(model)
    found = attention_map(model, image, "pool", head="each")
    assert found.layer == "pool"
    torch.testing.assert_close(zoo.joined(found), expected, rtol=0, atol=1e-5)
    with pytest.raises(InputValueError, match="there are 1 tokens"):
        attention_map(model, image, "pool", query=1)
    pooled = zoo.make("vit_pe_core_tiny_patch16_384", **SMALL)
    found = attention_map(pooled, image, "pool")  # which pools the class token, too
    assert found.prefix.shape[-1] == 1
    assert torch.allclose(zoo.joined(found).sum(-1), torch.ones(()))


# ---- dtypes, masks, foreign parts ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_other_dtypes(name, dtype, zoo):
    model, image = zoo.make(name, **SMALL), zoo.noise()
    expected = zoo.dense(model.double(), image.double())[0][:, :, :1]
    found = attention_map(model.to(dtype), image, 0, "cls", "each")
    assert found.patches.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    atol = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(zoo.joined(found).double(), expected, rtol=0, atol=atol)
    if dtype == torch.float64:
        return
    with torch.autocast("cpu", dtype):
        found = attention_map(model.float(), image, 0, "cls", "each")
    assert found.patches.dtype == torch.float32
    torch.testing.assert_close(zoo.joined(found).double(), expected, rtol=0, atol=atol)
    assert torch.allclose(zoo.joined(found).sum(-1), torch.ones(()), atol=1e-5)


def test_training_mode_drops_nothing_and_keeps_its_random_state(zoo):
    model, image = (
        zoo.make(
            "vit_tiny_patch16_224",
            drop_path_rate=0.5,
            proj_drop_rate=0.5,
            attn_drop_rate=0.5,
            patch_drop_rate=0.5,
        ),
        zoo.noise(),
    )
    expected = zoo.dense(model, image)[1][:, :, :1]
    model.train()
    model.blocks[0].eval()
    state = torch.get_rng_state()
    found = attention_map(model, image, -1, "cls", "each")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(zoo.joined(found), expected, rtol=0, atol=1e-5)
    assert model.training and model.blocks[1].mlp.training and not model.blocks[0].mlp.training
    assert not found.patches.requires_grad


class Lora(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _lora(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.blocks[1].attn.qkv = Lora(model.blocks[1].attn.qkv)


def _hooked_qkv(model: nn.Module) -> None:
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, out: out * 1.5)


def _hooked_norm(model: nn.Module) -> None:
    # Which looks at all tokens: it cannot be called on some.
    model.blocks[1].norm1.register_forward_hook(lambda m, args, out: out - out.mean(1, True))


def _hooked_attention(model: nn.Module) -> None:
    model.blocks[1].attn.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))


def _hooked_block(model: nn.Module) -> None:
    model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0].roll(1, -1),))


def _parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)
    with torch.no_grad():
        model.blocks[1].attn.qkv.parametrizations.weight.original0.mul_(1.5)


def _own_scale(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 0.5


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "change",
    [_lora, _hooked_qkv, _hooked_norm, _hooked_attention, _hooked_block, _parametrized, _own_scale],
)
def test_what_others_put_into_a_block_counts(change, swapped, zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    plain = zoo.dense(model, image)[1][:, :, :1]
    change(model)
    expected = zoo.dense(model, image)[1][:, :, :1]
    assert (expected - plain).abs().max() > 1e-3
    if swapped:
        vitfast.swap(model)
    found = attention_map(model, image, -1, "cls", "each")
    torch.testing.assert_close(zoo.joined(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_the_model_passes_on(kind, zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    mask = torch.rand(13, 13, generator=torch.Generator().manual_seed(2)) > 0.4
    mask.fill_diagonal_(True)
    if kind == "float":
        mask = torch.where(mask, 0.3, -2.0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model.forward_features(x, attn_mask=mask)

    found = zoo.dense(Masked(), image)
    maps = attention_map(Masked(), image, "all", [0, 4], "each")
    for one, right in zip(maps, found, strict=True):
        torch.testing.assert_close(zoo.joined(one), right[:, :, [0, 4]], rtol=0, atol=1e-5)


# ---- images -------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_are_one(zoo, tmp_path):
    model = zoo.make("vit_tiny_patch16_224")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    mean, std = (torch.tensor(model.pretrained_cfg[n]).view(3, 1, 1) for n in ("mean", "std"))
    floats = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    expected = attention_map(model, floats).patches
    for image in (
        floats[None],
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels),
        path,
        str(path),
    ):
        torch.testing.assert_close(attention_map(model, image).patches, expected, rtol=0, atol=1e-6)
    larger = Image.fromarray(pixels).resize((128, 96))
    assert attention_map(model, larger).patches.shape == expected.shape


def test_upsampled(zoo):
    found = attention_map(zoo.make("vit_tiny_patch16_224"), zoo.noise(), head="each")
    assert found.upsampled((48, 64)).shape == (2, 3, 1, 48, 64)
    nearest = found.upsampled((6, 8), "nearest")
    assert torch.equal(nearest[..., ::2, ::2], found.patches)
    for size, mode, message in (
        ((0, 4), "bilinear", "size"),
        ((4,), "bilinear", "size"),
        (4, "bilinear", "size"),
        ((4, 4), "x", "mode"),
    ):
        with pytest.raises(InputValueError, match=message):
            found.upsampled(size, mode)
