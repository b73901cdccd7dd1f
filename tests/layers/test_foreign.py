"""A child that cannot be read costs only its own part: it is called as timm calls it, in its place,
and the rest of the block stays fused, in inference and training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm.layers as tl
import torch
from timm.models import (
    beit,
    convnext,
    edgenext,
    eva,
    maxxvit,
    swin_transformer,
    swin_transformer_v2,
)
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.utils import parametrize

from vitfast import layers
from vitfast.swap import restore, swap

C, HEADS, N = 24, 2, 10
SHIFTED = dict(input_resolution=(8, 12), window_size=4, shift_size=2)


def partition() -> nn.Module:
    config = maxxvit.MaxxVitTransformerCfg(
        dim_head=12, window_size=(4, 3), grid_size=(4, 3), rel_pos_type="bias", init_values=0.1
    )
    return maxxvit.PartitionAttentionCl(C, "block", config)


# Name -> timm's block and the shape of its input.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (partial(Block, C, HEADS, qkv_bias=True, qk_norm=True, init_values=0.1), (2, N, C)),
    "eva": (partial(eva.EvaBlock, C, HEADS, qkv_bias=False, init_values=0.1), (2, N, C)),
    "eva biased": (partial(eva.EvaBlock, C, HEADS, qkv_bias=True), (2, N, C)),
    "eva split": (
        partial(eva.EvaBlock, C, HEADS, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
        (2, N, C),
    ),
    "beit": (partial(beit.Block, C, HEADS, window_size=(3, 3), init_values=0.1), (2, N, C)),
    "swin": (
        partial(swin_transformer.SwinTransformerBlock, C, num_heads=HEADS, **SHIFTED),
        (2, 8, 12, C),
    ),
    "swin v2": (
        partial(swin_transformer_v2.SwinTransformerV2Block, C, num_heads=HEADS, **SHIFTED),
        (2, 8, 12, C),
    ),
    "maxvit": (partition, (2, 8, 6, C)),
    "convnext": (partial(convnext.ConvNeXtBlock, C, ls_init_value=0.1), (2, C, 5, 6)),
    "convnext of edgenext": (partial(edgenext.ConvBlock, C), (2, C, 5, 6)),
    "convnext of maxxvit": (
        partial(
            maxxvit.ConvNeXtBlock,
            C,
            cfg=maxxvit.MaxxVitConvCfg(
                block_type="convnext", norm_layer="layernorm2d", init_values=0.1
            ),
        ),
        (2, C, 5, 6),
    ),
    "convnext conv": (
        partial(convnext.ConvNeXtBlock, C, conv_mlp=True, norm_layer=tl.LayerNorm2d),
        (2, C, 5, 6),
    ),
}


class Wrapped(nn.Module):
    """As a quantised or adapted layer: another class, whose weights are to be found elsewhere."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(1.25))

    @property
    def weight(self):
        return self.base.weight  # which timm reads of a qkv with separate biases

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * self.scale


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def replaced(child: nn.Module) -> None:
    original = child.forward
    child.forward = lambda *args, **kwargs: original(*args, **kwargs) * 0.5


def narrowed(child: nn.Module) -> None:
    if type(child) is nn.Linear:
        child.__class__ = Subclass
    else:
        child.register_forward_hook(lambda m, args, out: out.tanh())


def doubled(child: nn.Module) -> None:
    for name, _ in list(child.named_parameters(recurse=False)):
        parametrize.register_parametrization(child, name, Doubled())


KINDS = {
    "wrapped": Wrapped,
    "hook": lambda m: m.register_forward_hook(lambda m, args, out: out * 0.5) and None,
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, a: (a[0] * 0.5, *a[1:])) and None,
    "backward hook": lambda m: (
        m.register_full_backward_hook(lambda m, given, wanted: (given[0] * 0.5,)) and None
    ),
    "forward": replaced,
    "subclass": narrowed,
    "parametrization": doubled,
}
FIRST = ("norm1", "attn", "attn.qkv", "attn.q_proj", "attn.k_proj", "attn.proj", "ls1")
HEAD = ("conv_dw", "norm")
SECOND = ("norm2", "mlp", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2", "mlp.act", "ls2")
SINKS = [
    (name, path)
    for name, (make, _) in BLOCKS.items()
    for path in (*(HEAD if "convnext" in name else FIRST), *SECOND)
    if path in dict(make().named_modules()) and not ("convnext" in name and path == "mlp.act")
]


def make(name: str, lively) -> tuple[nn.Module, torch.Tensor]:
    build, shape = BLOCKS[name]
    return lively(build()).eval(), torch.randn(shape)


def change(block: nn.Module, path: str, kind: str) -> None:
    parent, _, name = path.rpartition(".")
    above = block.get_submodule(parent)
    new = KINDS[kind](getattr(above, name))
    if new is not None:
        setattr(above, name, new)


def unneeded(ours: nn.Module, path: str) -> list[type]:
    """Whose forward must not run: the block's as timm has it; the other half's attention or MLP;
    of the own half timm's, if it has to call but a linear layer there."""
    attn, mlp = (type(getattr(ours, name, None)) for name in ("attn", "mlp"))
    found = [type(ours).timm_class, mlp if path in FIRST + HEAD else attn]
    if path in ("mlp.fc1", "mlp.fc2", "mlp.fc1_g", "mlp.fc1_x") and issubclass(mlp, layers.Layer):
        found.append(mlp.timm_class)
    elif attn in (layers.Attention, layers.EvaAttention) and "attn." in path:
        # With separate biases timm's forward reads qkv instead of calling it.
        called = path == "attn.proj" or getattr(ours.attn, "q_bias", None) is None
        found += [attn.timm_class] if called else []
    return [kind for kind in found if kind is not type(None)]


def results(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three results of inference, one of training and its gradients."""
    with torch.no_grad():
        found = {f"inference {i}": block(x) for i in range(3)}
    x = x.clone().requires_grad_()
    out = block(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    parameters = {n: p for n, p in block.named_parameters() if p.requires_grad}
    wanted = {"x": x} | parameters
    gradients = torch.autograd.grad(out, list(wanted.values()), weights, allow_unused=True)
    named = {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}
    return found | {"training": out.detach()} | named


def agree(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error, most = (actual[name] - value).abs().max(), value.abs().max()
        assert error <= 1e-4 * most + 1e-4 * (value.ndim == 0) + 1e-6, (
            f"{name}: off by {error} of {most}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, path", SINKS, ids=[f"{n}-{p}" for n, p in SINKS])
def test_foreign_child_costs_its_part(lively, monkeypatch, refusal, name, path, kind):
    theirs, x = make(name, lively)
    ours = copy.deepcopy(theirs)
    swap(ours)
    refused = unneeded(ours, path)
    with torch.no_grad():
        ours(x)
    for block in (ours, theirs):
        torch.manual_seed(1)
        change(block, path, kind)
    with torch.no_grad():
        assert (theirs(x) - restore(copy.deepcopy(ours))(x)).abs().max() < 1e-5
    expected = results(theirs, x)

    for forbidden in refused:
        monkeypatch.setattr(forbidden, "forward", refusal(f"{forbidden.__name__}.forward ran"))
    agree(results(ours, x), expected)


@pytest.mark.parametrize("hooked", ["before the swap", "before and until after", "after the swap"])
def test_leftover_of_a_removed_hook_is_no_replacement(lively, hooked):
    """accelerate puts a bound original back into the instance, also of what was swapped since."""
    theirs, x = make("vit", lively)
    ours = copy.deepcopy(theirs)
    originals = {m: m.forward for m in ours.modules()}
    if hooked == "before the swap":
        for module, forward in originals.items():
            module.forward = forward
    swap(ours)
    assert "forward" not in vars(ours) | vars(ours.attn)
    if hooked == "after the swap":
        originals = {m: m.forward for m in ours.modules()}
    if hooked != "before the swap":
        for module, forward in originals.items():
            module.forward = forward
    assert {entry.note for entry in swap(copy.deepcopy(ours)).swapped} == {""}
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(x), theirs(x))
        assert torch.equal(restore(ours)(x), theirs(x))
    assert "forward" not in vars(ours) | vars(ours.attn)


def test_bound_forward_of_another_module_is_a_replacement(lively):
    theirs, x = make("vit", lively)
    ours = copy.deepcopy(theirs)
    swap(ours)
    for block in (theirs, ours):
        block.mlp.fc1.forward = copy.deepcopy(block.mlp.fc1).forward
        with torch.no_grad():
            block.mlp.fc1.weight.zero_()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_trained_adapter_of_frozen_blocks(lively):
    """Nothing that a plan holds requires a gradient, only what it calls."""
    theirs, x = make("vit", lively)
    theirs.requires_grad_(False)
    for path in ("attn.qkv", "mlp.fc2"):
        for block in (theirs, ours := copy.deepcopy(theirs)):
            change(block, path, "wrapped")
        swap(ours)
        for block in (ours, theirs):
            block(x).square().sum().backward()
        scales = [block.get_submodule(path).scale.grad for block in (ours, theirs)]
        torch.testing.assert_close(*scales)
        assert scales[0] != 0


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "mlp", "mlp.fc1"])
def test_compiled(lively, one_graph, path):
    block, x = make("vit", lively)
    change(block, path, "wrapped")
    swap(block)
    assert "vitfast" in one_graph(block, x)


@pytest.mark.parametrize("path", ["attn", "mlp.fc1"])
def test_stream_of_a_subclass_is_for_timm(lively, path):
    """What is called may give a tensor of any class; it reaches the next half as in timm."""

    class Tagged(torch.Tensor):
        pass

    theirs, x = make("vit", lively)
    ours = copy.deepcopy(theirs)
    swap(ours)
    for block in (ours, theirs):
        child = block.get_submodule(path if path == "attn" else "norm1")
        child.register_forward_hook(lambda m, args, out: out.as_subclass(Tagged))
    found, expected = ours(x), theirs(x)
    assert type(found) is type(expected) is Tagged
    torch.testing.assert_close(found, expected)


def test_report_names_what_is_called(lively):
    block, _ = make("vit", lively)
    change(block, "attn.qkv", "wrapped")
    change(block, "mlp.fc1", "hook")
    [_, *entries] = swap(block).swapped
    notes = {entry.path: entry.note for entry in entries}
    assert notes["attn"] == "calls a child as timm does: qkv is a Wrapped, not torch.nn.Linear"
    assert notes["mlp"] == "calls a child as timm does: fc1 has hooks"
    restore(block)
    block, _ = make("vit", lively)
    change(block, "attn.qkv", "wrapped")
    [entry, *_] = swap(block).swapped
    assert entry.note == "calls attn as timm does: qkv is a Wrapped, not torch.nn.Linear"


# Options that no drop-in has, of one half of a block.
UNSUPPORTED = {
    "gated": partial(eva.EvaBlock, C, HEADS, gated_attn=True),
    "attention": partial(Block, C, HEADS, attn_layer="diff"),
    "act": partial(Block, C, HEADS, act_layer=nn.Hardswish),
}


@pytest.mark.timm("1.0.29")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_option_costs_its_half(lively, monkeypatch, refusal, name):
    theirs = lively(UNSUPPORTED[name]()).eval()
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    assert report.swapped[0].path == "" and "not implemented" in report.swapped[0].note
    x = torch.randn(2, N, C)
    expected = results(theirs, x)
    other = ours.attn if name == "act" else ours.mlp
    for kind in (type(theirs), type(other)):
        monkeypatch.setattr(kind, "forward", refusal("it ran"))
    agree(results(ours, x), expected)
