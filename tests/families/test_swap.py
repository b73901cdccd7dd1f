"""swap, restore, create_model and the report."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from timm import layers as timm_layers
from timm.layers import LayerNormFp32
from timm.models import vision_transformer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import vitfast
from vitfast import layers
from vitfast.errors import InputTypeError, InputValueError, SwapError
from vitfast.runtime import native, triton
from vitfast.settings import settings
from vitfast.swap import SwapReport, create_model, restore, swap

SMALL = dict(depth=3, embed_dim=48, num_heads=3, img_size=32, num_classes=7)


def vit(name: str = "vit_tiny_patch16_224", **more) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL | more)).eval()


def swapped_paths(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, layers.Layer)}


class PlainSubclass(vision_transformer.Block):
    pass


class OwnForward(vision_transformer.Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * 2


def test_report_table():
    text = str(swap(vit()))
    assert text.splitlines() == [
        "vitfast: VisionTransformer: 3 of 3 blocks swapped, 18 modules in all",
        "",
        "swapped",
        "  patch_embed       PatchEmbed  -> vitfast.layers.PatchEmbed  x1",
        "  blocks            Sequential  -> vitfast.layers.Sequential  x1",
        "  blocks.0-2        Block       -> vitfast.layers.Block       x3",
        "  blocks.0-2.norm1  LayerNorm   -> vitfast.layers.LayerNorm   x3",
        "  blocks.0-2.attn   Attention   -> vitfast.layers.Attention   x3",
        "  blocks.0-2.norm2  LayerNorm   -> vitfast.layers.LayerNorm   x3",
        "  blocks.0-2.mlp    Mlp         -> vitfast.layers.Mlp         x3",
        "  norm              LayerNorm   -> vitfast.layers.LayerNorm   x1",
    ]


def test_report_of_what_was_left():
    model = vit("vit_base_patch16_siglip_224")
    model.blocks[1] = OwnForward(48, 3)
    report = swap(model)
    assert "2 of 3 blocks swapped" in str(report)
    assert "  blocks.0,2        Block" in str(report)
    left = {e.path: (e.timm_class, e.reason) for e in report.skipped}
    assert left["blocks.1"] == ("OwnForward", "subclass of Block overrides forward")
    assert left["attn_pool"][0] == "AttentionPoolLatent"
    assert "left to timm" in str(report)


def test_report_as_json():
    report = swap(vit("vit_base_patch16_siglip_224"))
    data = json.loads(report.to_json())
    assert data["model"] == "VisionTransformer"
    assert data["counts"] == report.counts
    assert data["counts"]["blocks"] == data["counts"]["blocks_swapped"] == 3
    assert len(data["swapped"]) == data["counts"]["swapped"]
    assert {
        "path": "blocks.0.attn",
        "timm_class": "Attention",
        "layer_class": "vitfast.layers.Attention",
        "role": "attention",
        "note": "",
    } in data["swapped"]
    assert data["skipped"][0]["path"] == "attn_pool"


def test_report_notes_what_falls_back_for_now():
    model = vit()
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: None)
    model.blocks[1].attn.fused_attn = False
    notes = {e.path: e.note for e in swap(model).swapped if e.note}
    assert notes["blocks.0"] == "calls attn as timm does: qkv has hooks"
    assert notes["blocks.1.attn"] == "runs timm's forward now: fused_attn is off"
    assert not any(path.startswith("blocks.2") for path in notes)


def test_second_swap_changes_and_says_nothing_new():
    model = vit("vit_base_patch16_siglip_224")
    first = swap(model)
    classes = [type(m) for m in model.modules()]
    second = swap(model)
    assert second == first
    assert [type(m) for m in model.modules()] == classes
    assert swap(model, skip="blocks.0").counts == first.counts


def test_nothing_to_swap():
    report = swap(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert str(report).endswith("Sequential holds nothing that vitfast knows; nothing was swapped")
    assert report.counts == {"swapped": 0, "skipped": 0, "blocks": 0, "blocks_swapped": 0}
    report = swap(nn.Sequential(nn.LayerNorm(4)))
    assert "no block that vitfast knows, 1 modules in all" in str(report)


def test_a_module_alone():
    block = vision_transformer.Block(48, 3)
    assert "  (model)  Block      -> vitfast.layers.Block" in str(swap(block))
    assert type(block) is layers.Block


ATTENTION = {f"blocks.{i}.attn" for i in range(3)}
CHOICES = {
    "path": (dict(only="blocks.1.mlp"), {"blocks.1.mlp"}),
    "wildcard": (dict(only="blocks.*.attn"), ATTENTION),
    "list": (dict(only=["norm", "*.2.norm?"]), {"norm", "blocks.2.norm1", "blocks.2.norm2"}),
    "below": (
        dict(only="blocks.0"),
        {"blocks.0", *(f"blocks.0.{n}" for n in ("norm1", "attn", "norm2", "mlp"))},
    ),
    "timm_class": (dict(only=timm_layers.Attention), ATTENTION),
    "layer_class": (dict(only=layers.Attention), ATTENTION),
    "both": (dict(only=["blocks.*.attn"], skip="blocks.1"), ATTENTION - {"blocks.1.attn"}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_only_and_skip(name):
    options, expected = CHOICES[name]
    model = vit()
    report = swap(model, **options)
    assert swapped_paths(model) == expected == {e.path for e in report.swapped}
    assert all(e.by_choice for e in report.skipped)


@pytest.mark.parametrize("skip", [timm_layers.Attention, "*.attn", "*.qkv"])
def test_a_block_with_a_skipped_child_is_left_alone(skip):
    model = vit()
    report = swap(model, skip=skip)
    paths = swapped_paths(model)
    assert "blocks.0" not in paths and "blocks.0.attn" not in paths
    assert {"blocks.0.mlp", "blocks.0.norm1", "norm", "patch_embed"} <= paths
    reasons = {e.path: e.reason for e in report.skipped}
    assert reasons["blocks.0"] == "a child of it is named in skip"


def test_choices_that_match_nothing_or_make_no_sense():
    for options in (dict(only="blok.*"), dict(skip=nn.Conv3d)):
        with pytest.raises(InputValueError, match="matches no module of this model"):
            swap(vit(), **options)
    with pytest.raises(InputTypeError, match="expected path patterns or classes, got 3"):
        swap(vit(), only=[3])
    for options in (dict(only=3), dict(skip=3)):
        with pytest.raises(InputTypeError, match="expected path patterns or classes, got 3"):
            swap(vit(), **options)


@pytest.mark.parametrize("model", [None, "vit_tiny_patch16_224", torch.zeros(1), nn.Linear])
def test_no_module(model):
    for function in (swap, restore):
        with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Module, got"):
            function(model)


STRICT = {
    "gap": (lambda m: vit("vit_base_patch16_siglip_224"), "attn_pool (AttentionPoolLatent)"),
    "subclass": (lambda m: m.blocks.insert(1, OwnForward(48, 3)), "blocks.1 (OwnForward)"),
    "plain_subclass": (lambda m: m.blocks.insert(2, PlainSubclass(48, 3)), "is not timm's own"),
    "option": (
        lambda m: m.blocks.append(vision_transformer.Block(48, 3, norm_layer=LayerNormFp32)),
        "blocks.3 (Block) cannot be swapped: norm LayerNormFp32",
    ),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict(name):
    model = vit()
    change, message = STRICT[name]
    changed = change(model)
    model = changed if hasattr(changed, "patch_embed") else model
    with pytest.raises(SwapError) as error:
        swap(model, strict=True)
    assert message in str(error.value)
    assert not swapped_paths(model)
    assert swap(model).skipped


def test_strict_accepts_what_is_complete_or_chosen(needs_native):
    assert swap(vit(), strict=True).counts["blocks_swapped"] == 3
    model = vit("vit_base_patch16_siglip_224")
    assert swap(model, strict=True, skip="attn_pool").counts["blocks_swapped"] == 3
    model = vit("vit_small_r26_s32_224", img_size=64)  # a stem is no block
    assert swap(model, strict=True).counts["blocks_swapped"] == 3


def test_shared_module_is_swapped_once():
    model = vit()
    model.blocks[1] = model.blocks[0]
    assert swap(model).counts["blocks_swapped"] == 2


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "data_parallel"])
def test_wrappers_are_looked_through(wrap):
    model = vit()
    report = swap(wrap(model), only="blocks.0")
    assert report.swapped[0].path == "blocks.0" and report.model == "VisionTransformer"
    assert type(model.blocks[0]) is layers.Block
    restore(wrap(model))
    assert not swapped_paths(model)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(vit())
        x = torch.randn(2, 3, 32, 32)
        expected = model(x)
        assert swap(model).counts["blocks_swapped"] == 3
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["swap_then_shard", "shard_then_swap"])
def test_fully_shard(tmp_path, order, needs_native):
    """It gives modules a class made as the program runs, over whatever class they have."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))

        def shard(model: nn.Module) -> list[type]:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return [type(m) for m in model.modules()]

        def train(model: nn.Module) -> torch.Tensor:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                loss = model(torch.ones(2, 3, 32, 32)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                return torch.stack([model(torch.ones(2, 3, 32, 32)) for _ in range(4)])

        theirs, ours = vit(), vit()
        classes = shard(theirs)
        if order == "swap_then_shard":
            swap(ours)
        shard(ours)
        report = swap(ours, strict=True)
        # A Sequential of sharded blocks, whose hooks see all, is left as it is.
        count = 18 if order == "swap_then_shard" else 17
        line = f"vitfast: VisionTransformer: 3 of 3 blocks swapped, {count}"
        assert str(report).startswith(line)
        assert not report.skipped
        assert {e.note for e in report.swapped} == {
            "fused where its sharded weights are gathered for its forward, as by fully_shard"
        }
        assert isinstance(ours.blocks[1], layers.Block) and isinstance(ours.blocks[1], FSDPModule)
        assert swap(ours, only=layers.Mlp, strict=True).counts["swapped"] == count
        picked = vitfast.ops.spec_of("mlp").dispatcher
        picked.picked = None
        torch.testing.assert_close(train(ours), train(theirs), rtol=1e-3, atol=1e-4)
        assert picked.picked is not None
        restore(ours)
        assert not swapped_paths(ours)
        now = [type(m) for m in ours.modules()]
        assert [(c.__name__, c.__bases__) for c in now] == [
            (c.__name__, c.__bases__) for c in classes
        ]
        assert order == "swap_then_shard" or now == classes
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_block_computes_of_its_children_is_not_left_to_timm():
    """An Mlp of 1x1 convolutions has no layer of its own; ConvNeXt's block fuses it."""
    model = timm.create_model("convnext_atto")
    report = swap(model)
    assert "12 of 12 blocks swapped" in str(report)
    assert not report.skipped
    restore(model)
    model.stages[0].blocks[1].mlp.fc1.register_forward_hook(lambda *args: None)
    left = {e.path for e in swap(model).skipped}
    assert left == {"stages.0.blocks.1.mlp"}  # its block cannot run fused now, and it has no layer
    restore(model)
    left = swap(model, only="*.mlp").skipped
    assert sum("convolutions over NCHW" in e.reason for e in left if e.path.endswith(".mlp")) == 12


@pytest.mark.parametrize("where", ["native", "disabled"])
def test_without_any_kernel_the_report_says_so_and_strict_refuses(monkeypatch, where):
    if where == "native":
        why = "native extension not built: no compiler; there is no GPU"
        monkeypatch.setattr(native, "reasons", lambda: ["native extension not built: no compiler"])
        monkeypatch.setattr(triton, "available", lambda: ["there is no GPU"])
    else:
        why = "VITFAST_DISABLE is set"
        monkeypatch.setattr(settings, "disable", True)
    model = vit()
    with pytest.raises(SwapError, match=f"VisionTransformer would gain nothing: {why}; "):
        swap(model, strict=True)
    assert not swapped_paths(model)
    report = swap(model)
    line = f"18 modules in all; but none of vitfast's kernels can run here: {why}"
    assert str(report).splitlines()[0].endswith(line)
    assert report.to_dict()["no_kernels"] == why


def test_a_kernel_on_either_device_is_one(monkeypatch):
    for module, function in ((native, "reasons"), (triton, "available")):
        with monkeypatch.context() as patch:
            patch.setattr(native, "reasons", lambda: ["no compiler"])
            patch.setattr(triton, "available", lambda: ["no GPU"])
            patch.setattr(module, function, list)
            report = swap(vit(), strict=True)
        # The model lies on the CPU, but may be moved.
        left = "; 18 of them run timm's forward now" if module is triton else ""
        assert report.no_kernels == ""
        assert str(report).splitlines()[0].endswith(f"18 modules in all{left}")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), {}),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), {"only": "0"}),
    ],
)
def test_strict_refuses_to_swap_nothing(model, options, needs_native):
    with pytest.raises(SwapError, match="Sequential would gain nothing: it holds nothing that"):
        swap(model(), strict=True, **options)


def test_restore_of_a_part():
    model = vit()
    swap(model)
    assert restore(model.blocks[0]) is model.blocks[0]
    assert type(model.blocks[0]) is vision_transformer.Block
    assert type(model.blocks[1]) is layers.Block


def test_create_model():
    model = create_model("vit_tiny_patch16_224", **SMALL)
    assert type(model.blocks[2]) is layers.Block and len(model.blocks) == 3
    with pytest.raises(RuntimeError, match="Unknown model"):
        create_model("vit_of_nobody")


def test_package_attribute_is_callable_whatever_was_imported_first():
    """`vitfast.swap` names a function and a file."""
    code = (
        "from vitfast.swap import SwapReport\n"
        "import torch, vitfast\n"
        "model = torch.nn.Sequential(torch.nn.LayerNorm(4))\n"
        "assert vitfast.swap(model, only='0').counts['swapped'] == 1\n"
        "vitfast.restore(model)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(vitfast.swap(vit()), SwapReport)
