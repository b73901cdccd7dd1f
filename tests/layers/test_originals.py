"""What timm's forward would call, replaced: it is called as often as in timm's model.

Whoever replaces a class's forward or a function, or watches by a function mode, counts, quantises
or traces what passes there.
"""

from __future__ import annotations

import copy
import types

import pytest
import timm
import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.models import convnext, swin_transformer, vision_transformer
from torch import nn
from torch.overrides import TorchFunctionMode

from vitfast.engine import originals
from vitfast.engine.eligibility import may_fuse
from vitfast.families import layer_table
from vitfast.swap import swap

C = 24
MODELS = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=C, depth=2, num_heads=3, init_values=0.1
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=C, depths=(2, 1),
        num_heads=(2, 4),
    ),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8, 16, 24, 32)),
}  # fmt: skip
FORWARDS = {
    "vit": (
        nn.Linear, nn.GELU, nn.Dropout, nn.Identity, tl.LayerNorm, tl.LayerScale, tl.Mlp,
        tl.Attention, tl.PatchEmbed, nn.Conv2d, vision_transformer.Block,
    ),
    "swin": (
        nn.Linear, nn.GELU, nn.Dropout, nn.LayerNorm, tl.Mlp, swin_transformer.WindowAttention,
        swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging, tl.PatchEmbed,
    ),
    "convnext": (
        nn.Conv2d, tl.LayerNorm2d, tl.Mlp, nn.Sequential, convnext.ConvNeXtBlock,
    ),
}  # fmt: skip
FUNCTIONS = {
    "vit": ("linear", "layer_norm", "gelu", "scaled_dot_product_attention", "dropout", "conv2d"),
    "swin": ("linear", "layer_norm", "gelu", "softmax", "dropout", "conv2d"),
    "convnext": ("conv2d", "layer_norm"),
}
PLACES = [
    *((model, kind, "forward") for model, kinds in FORWARDS.items() for kind in kinds),
    *((model, F, name) for model, names in FUNCTIONS.items() for name in names),
    *((model, nn.Module, name) for model in MODELS for name in ("__call__", "_call_impl")),
    ("vit", tl.attention, "F"),
    ("swin", swin_transformer, "window_partition"),
    ("swin", swin_transformer, "window_reverse"),
    ("swin", swin_transformer.WindowAttention, "_get_rel_pos_bias"),
    ("swin", swin_transformer.SwinTransformerBlock, "_attn"),
    ("convnext", nn.Conv2d, "_conv_forward"),
]  # fmt: skip


def counted(original, calls):
    """What counts the calls of a function, or those of a namespace's functions."""
    if isinstance(original, types.ModuleType):
        functions = {n: counted(v, calls) for n, v in vars(original).items() if callable(v)}
        return types.SimpleNamespace(**functions)

    def replacement(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    return replacement


def images():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def pair(request):
    """timm's model and its swapped twin, which has run a few times without autograd and with it."""
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    with torch.no_grad():
        for _ in range(3):
            ours(images())
    ours(images())
    return theirs, ours


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(
    ("pair", "owner", "name"),
    PLACES,
    indirect=["pair"],
    ids=[f"{m}-{o.__name__}.{n}" for m, o, n in PLACES],
)
def test_a_replacement_is_called_as_in_timm(monkeypatch, pair, owner, name, grad):
    x, calls, counts = images(), [], []
    with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(owner, name, counted(getattr(owner, name), calls))
        for model in pair:
            calls.clear()
            model(x)
            counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_forward_replaced_before_the_swap_is_called_and_reported(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Linear, "forward", counted(nn.Linear.forward, calls))
    block = vision_transformer.Block(C, 3).eval()
    report = swap(block)
    assert "runs timm's forward now: torch's Linear.forward was replaced" in str(report)
    block(torch.randn(2, 5, C))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (vision_transformer.Block, "forward", "timm's Block.forward"),
        (tl.Attention, "forward", "timm's Attention.forward"),
        (F, "gelu", "torch.nn.functional.gelu"),
        (tl.attention, "maybe_add_mask", "timm.layers.attention.maybe_add_mask"),
    ],
)
def test_the_report_names_what_was_replaced(monkeypatch, owner, name, words):
    block = vision_transformer.Block(C, 3).eval()
    assert "was replaced" not in str(swap(block))
    monkeypatch.setattr(owner, name, counted(getattr(owner, name), []))
    (note,) = [e.note for e in swap(block).swapped if e.path == ""]
    assert note.endswith(f" as timm does: {words} was replaced") or (
        note == f"runs timm's forward now: {words} was replaced"
    )


def test_a_drop_in_whose_forward_is_replaced_is_called(monkeypatch):
    block = vision_transformer.Block(C, 3).eval()
    swap(block)
    calls = []
    with torch.no_grad():
        block(torch.randn(2, 5, C))
        monkeypatch.setattr(type(block.mlp), "forward", counted(type(block.mlp).forward, calls))
        block(torch.randn(2, 5, C))
    assert calls == [1]


def test_what_was_put_back_is_fused_again(monkeypatch, timm_forbidden):
    block = vision_transformer.Block(C, 3).eval()
    swap(block)
    x = torch.randn(2, 5, C)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", counted(F.linear, []))
            block(x)
        with timm_forbidden():
            block(x)


class Count(TorchFunctionMode):
    """Counts the calls of every function."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("pair", MODELS, indirect=True)
def test_a_function_mode_sees_what_timm_calls(pair, grad):
    x, seen = images(), []
    with torch.set_grad_enabled(grad):
        for model in pair:
            with torch.device("cpu"), Count() as mode:
                model(x)
            seen.append({f: n for f, n in mode.calls.items() if f in vars(F).values()})
    assert seen[0] == seen[1]
    assert seen[0]


@pytest.mark.xfail(
    torch.__version__ < "2.12", reason="torch 2.11 guards on modes that it takes off as it traces"
)
def test_a_function_mode_sees_what_timm_compiles():
    block = vision_transformer.Block(C, 3).eval()
    swap(block)
    torch._dynamo.reset()
    with torch.no_grad(), Count() as mode:
        torch.compile(block, backend="eager")(torch.randn(2, 5, C))
    assert mode.calls[F.linear] == 4


def test_torch_device_as_a_context_changes_nothing(timm_forbidden):
    block = vision_transformer.Block(C, 3).eval()
    swap(block)
    x = torch.randn(2, 5, C)
    with torch.no_grad(), timm_forbidden():
        want = block(x)
        for device in ("cpu", "meta"):
            with torch.device(device):
                assert may_fuse(x)
                assert torch.equal(block(x), want)


def test_nothing_is_taken_for_replaced():
    """Of all that drop-ins stand for, and of what is in their models."""
    for kind, layer in layer_table().items():
        assert not originals.replaced(kind)
        assert not originals.replaced(layer)


def test_a_class_made_on_the_way_is_not_kept_alive():
    kind = type("Linear", (nn.Linear,), {})
    originals.replaced(kind)
    originals.calls(frozenset((kind, nn.GELU)))
    kept = [k for k in originals._CALLS if k is kind or (isinstance(k, frozenset) and kind in k)]
    assert not kept
