"""Small versions of real models of every kind against timm: outputs and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

from vitfast.swap import swap

# Registered model -> options that make it small; image size 32 unless it says otherwise.
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_r_s16_p8_224": dict(img_size=64),
    "vit_small_patch14_reg4_dinov2": dict(img_size=28),
    "vit_small_patch16_18x2_224": dict(partly=True),
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_rpn_224": dict(partly=True),
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_xp_224": dict(partly=True),
    "vit_so400m_patch14_siglip_224": dict(embed_dim=144, num_heads=2, img_size=28),
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_mediumd_patch16_reg4_gap_256": {},
    "vit_intern300m_patch14_448": dict(img_size=28),
    "aimv2_large_patch14_224": dict(img_size=28),
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "eva_giant_patch14_224": dict(embed_dim=176, num_heads=2, img_size=28),
    "eva02_tiny_patch14_224": dict(img_size=28),
    "eva02_base_patch14_224": dict(img_size=28),
    "eva02_enormous_patch14_clip_224": dict(partly=True, img_size=28),
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_small_patch16_512": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_large_patch16_sapiens2": dict(num_kv_heads=1),
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_medium_patch16_cls_224": {},
    "vit_relpos_medium_patch16_rpn_224": dict(partly=True),
    "vit_srelpos_small_patch16_224": {},
    "naflexvit_base_patch16_gap": dict(img_size=None),
    "naflexvit_so150m2_patch16_reg1_map": dict(img_size=None),
    "naflexvit_base_patch16_siglip": dict(img_size=None),
}


def small(name: str) -> tuple[torch.nn.Module, bool]:
    options = dict(depth=2, embed_dim=48, num_heads=3, img_size=32, num_classes=20) | MODELS[name]
    partly = options.pop("partly", False)
    options = {k: v for k, v in options.items() if v is not None}
    return timm.create_model(name, **options).eval(), not partly


# Older timm has the model, but not in float64.
RECENT = {"vit_small_patch16_rope_mixed_224": pytest.mark.timm("1.0.29")}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=RECENT.get(n, ())) for n in MODELS if n in timm.list_models()],
)
def test_model(parity, lively, name):
    model, fused = small(name)
    size = MODELS[name].get("img_size") or 32
    parity(lively(model), torch.randn(2, 3, size, size), fused=fused)


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("naflex")][::4])
def test_model_in_autocast(parity, lively, name):
    model, fused = small(name)
    size = MODELS[name].get("img_size", 32)
    x = torch.randn(2, 3, size, size)
    parity(lively(model), x, fused=fused, autocast=torch.bfloat16, backward=False)


@pytest.mark.parametrize("key_only", [False, True])
@pytest.mark.parametrize("rope", ["none", "axial"])
def test_naflex_batch_with_padding(parity, lively, key_only, rope):
    """Two images of different sizes: masked keys, and queries that see nothing real."""
    model = timm.create_model(
        "naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, num_classes=20,
        use_key_only_attn_mask=key_only, rope_type=rope,
    ).eval()  # fmt: skip
    coord = torch.cartesian_prod(torch.arange(3), torch.arange(4)).expand(2, -1, -1)
    valid = torch.arange(12).expand(2, -1) < torch.tensor([[12], [8]])
    patches = torch.randn(2, 12, 16 * 16 * 3) * valid[..., None]
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": valid}
    parity(lively(model), batch)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_224"]
)
def test_dynamic_image_size(parity, lively, name):
    options = dict(dynamic_img_size=True, dynamic_img_pad=True)
    model = timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=20, **options)
    parity(lively(model).eval(), torch.randn(2, 3, 40, 70))


def test_masks_through_the_model(lively):
    theirs = lively(small("vit_tiny_patch16_224")[0])
    x = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    expected = theirs(x, attn_mask=mask), theirs(x, is_causal=True)
    swap(theirs)
    torch.testing.assert_close((theirs(x, attn_mask=mask), theirs(x, is_causal=True)), expected)


def test_patch_dropout_with_rotary_embedding(lively):
    """Each sample keeps other patches, so the embedding has a batch dimension."""
    for name in ("vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"):
        options = dict(depth=2, embed_dim=48, num_heads=3, patch_drop_rate=0.5, img_size=64)
        model = lively(timm.create_model(name, **options)).train()
        x = torch.randn(2, 3, 64, 64)
        results = []
        for change in (lambda m: None, swap):
            change(model)
            torch.manual_seed(7)
            results.append(model(x))
        torch.testing.assert_close(*results)


@pytest.mark.timm("1.0.29")
def test_resized_models(lively):
    """set_input_size replaces position tables and patch projections."""
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"):
        theirs = lively(small(name)[0])
        x = torch.randn(2, 3, 24, 40)
        ours = swapped_copy(theirs)
        with torch.no_grad():
            ours(torch.randn(2, 3, 32, 32))
            for model in (theirs, ours):
                torch.manual_seed(0)
                model.set_input_size(img_size=(24, 40), patch_size=8)
            torch.testing.assert_close(ours(x), theirs(x))


def swapped_copy(model):
    model = copy.deepcopy(model)
    swap(model)
    return model


def test_training_follows_timm(lively):
    """Twenty optimiser steps with drop path, dropout of none, and autocast: the same loss curve."""
    curves = []
    for change in (lambda m: None, swap):
        torch.manual_seed(0)
        options = dict(drop_path_rate=0.2, init_values=0.1)
        model = timm.create_model(
            "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, num_classes=4,
            **options,
        )  # fmt: skip
        change(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
        losses = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.5 * curves[0][0]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=0.05, atol=0.02)
