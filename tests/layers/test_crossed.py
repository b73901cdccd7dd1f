"""Two things at a time that may hide each other, for every drop-in of tests/layers/test_sweep.py.

A check of one trigger is not tested while another one, which leads to the same, is present as well;
nor is what training mode does without gradients, by tests of training with and inference without.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.layers import DropPath, PatchEmbed
from timm.models import eva
from timm.models.vision_transformer import Block
from torch import nn

from tests.layers.sweep_cases import CASES, C
from tests.layers.test_sweep import HOOKS, built, difference, outcome
from vitfast.engine import memo
from vitfast.engine.products import weights as weights_cache
from vitfast.swap import swap

Change = Callable[[nn.Module], object]


def swapped(module: nn.Module) -> nn.Module:
    ours = copy.deepcopy(module)
    swap(ours)
    return ours


def drop_paths(module: nn.Module) -> list[str]:
    return [n for n, m in module.named_modules() if isinstance(m, DropPath) and m.drop_prob]


def only(active: str | None, module: nn.Module) -> nn.Module:
    """The module with only this one of its stochastic depths switched on, and that strongly."""
    for name in drop_paths(module):
        module.get_submodule(name).drop_prob = 0.5 if name == active else 0.0
    return module


def without_scales(module: nn.Module) -> nn.Module:
    """The module with every LayerScale an Identity and every gamma None, as built without."""
    for part in module.modules():
        for name, child in part.named_children():
            if type(child).__name__.startswith("LayerScale"):
                setattr(part, name, nn.Identity())
        for name in ("gamma", "gamma_1", "gamma_2"):
            if part._parameters.get(name) is not None:
                part._parameters[name] = None
    return module


DEEP = [case for case in CASES if drop_paths(CASES[case][0]())]


@pytest.mark.parametrize("scales", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("case", DEEP)
def test_each_stochastic_depth_alone(lively, case, scales):
    """With and without gradients; of several images, of which some are dropped."""
    module, (x, *others), kwargs = built(case, lively)
    args = (torch.cat([x, x + 1, x * 0.5]), *others)
    module = (module if scales else without_scales(module)).train()
    seen = []
    for active in (*drop_paths(module), None):
        theirs = only(active, copy.deepcopy(module))
        ours = swapped(theirs)
        for grad in (True, False, False, False):
            want = outcome(theirs, args, kwargs, True, grad)
            why = difference(outcome(ours, args, kwargs, True, grad), want)
            assert not why, f"{active}, grad {grad}: {why}"
        seen.append(want)
    for one in seen[:-1]:
        assert seen[-1] is None or difference(one, seen[-1])  # something was dropped


PAIRS = [
    ("backward hook", "backward pre-hook"),
    ("forward hook", "backward hook"),
    ("pre-hook", "backward pre-hook"),
]


def hooked(module: nn.Module, path: str, kinds: tuple[str, ...]) -> nn.Module:
    for kind in kinds:
        HOOKS[kind](module.get_submodule(path))
    return module


@pytest.mark.parametrize("case", ["block", "eva block", "swin block", "convnext v2", "davit block"])
def test_two_hooks_on_one_child(lively, case):
    module, args, kwargs = built(case, lively)
    module.train()
    for path, kinds in itertools.product(dict(module.named_modules()), PAIRS):
        if not path:
            continue
        want = outcome(hooked(copy.deepcopy(module), path, kinds), args, kwargs, True, True)
        ours = swapped(module)
        outcome(ours, args, kwargs, True, True)  # found to be bare
        why = difference(outcome(hooked(ours, path, kinds), args, kwargs, True, True), want)
        assert not why, f"{kinds} on {path}: {why}"


@pytest.mark.parametrize("gone", range(2))
@pytest.mark.parametrize("case", ["block", "swin block", "convnext v2"])
def test_one_of_two_hooks_goes(lively, case, gone):
    """What the first hook made to be looked at again, the second still is there to be seen for."""
    module, args, kwargs = built(case, lively)
    module.train()
    for path in dict(module.named_modules()):
        if not path:
            continue
        found = []
        for model in (copy.deepcopy(module), swapped(module)):
            child = model.get_submodule(path)
            handles = [HOOKS[kind](child) for kind in ("backward hook", "backward pre-hook")]
            outcome(model, args, kwargs, True, True)
            handles[gone].remove()
            found.append(outcome(model, args, kwargs, True, True))
        assert not difference(found[1], found[0]), path


def convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, child in module.named_modules():
        if type(child) is nn.Conv2d:
            yield name, child


def rebuilt(old: nn.Conv2d, **options: object) -> nn.Conv2d:
    """Such a convolution by other options, of weights of its own."""
    torch.manual_seed(3)
    given = {n: getattr(old, n) for n in ("kernel_size", "stride", "padding", "dilation", "groups")}
    return nn.Conv2d(
        old.in_channels, old.out_channels, **{**given, **options}, bias=old.bias is not None
    )


OTHERS = {
    "grouped": {"groups": 2},
    "padded": {"padding": 1},
    "dilated": {"dilation": 2},
    "strided": {"stride": 3},
    "reflecting": {"padding": (1, 2), "padding_mode": "reflect"},
    "padded by name": {"padding": "same", "stride": 1},
    "of a wider kernel": {"kernel_size": 3, "padding": 1, "stride": 1},
    "of unequal sides": {"kernel_size": (1, 3), "padding": (0, 1)},
}
CONVOLVING = [case for case in CASES if 0 < len(list(convolutions(CASES[case][0]()))) < 8]


@pytest.mark.parametrize("case", CONVOLVING)
def test_other_convolutions_in_their_place(lively, case):
    """Before and after the first call: each gives timm's numbers, or raises where timm does."""
    module, args, kwargs = built(case, lively)
    module.eval()
    ran = 0
    for (path, old), name in itertools.product(list(convolutions(module)), OTHERS):
        try:
            new = rebuilt(old, **OTHERS[name])
        except (ValueError, RuntimeError):
            continue
        above, _, last = path.rpartition(".")
        theirs = copy.deepcopy(module)
        ours = swapped(module)
        for _ in range(3):
            outcome(ours, args, kwargs, False, False)
        for model in (theirs, ours):
            setattr(model.get_submodule(above), last, copy.deepcopy(new))
        for model in (ours, swapped(theirs)):
            for grad in (False, False, False, True):
                want = outcome(theirs, args, kwargs, False, grad)
                ran += want is not None
                why = difference(outcome(model, args, kwargs, False, grad), want)
                assert not why, f"{name} {path}, grad {grad}: {why}"
    assert ran


@pytest.mark.parametrize("patch", [(4, 6), (6, 4), (3, 5)])
@pytest.mark.parametrize("size", [(13, 20), (12, 17), (17, 30), (5, 7)])
def test_rectangular_patches_of_unequal_padding(lively, patch, size):
    module = lively(
        PatchEmbed(None, patch, 3, C, dynamic_img_pad=True, strict_img_size=False, flatten=True)
    )
    x = (torch.randn(2, 3, *size),)
    for grad in (True, False, False, False):
        want = outcome(module, x, {}, False, grad)
        assert want is not None
        assert not difference(outcome(swapped(module), x, {}, False, grad), want)


def norms_of_qk(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(getattr(part, "q_norm", None), nn.LayerNorm):
            yield part


QK_CHANGES: dict[str, Change] = {
    "q's eps": lambda a: setattr(a.q_norm, "eps", 0.5),
    "k's eps": lambda a: setattr(a.k_norm, "eps", 0.5),
    "swapped": lambda a: a._modules.update(q_norm=a.k_norm, k_norm=a.q_norm),
    "one for both": lambda a: setattr(a, "k_norm", a.q_norm),
    "q's bias alone": lambda a: setattr(a.k_norm, "bias", None),
    "k's weight alone": lambda a: setattr(a.q_norm, "weight", None),
    "no norm of k": lambda a: setattr(a, "k_norm", nn.Identity()),
}
NORMED = [case for case in CASES if any(True for _ in norms_of_qk(CASES[case][0]()))]


@pytest.mark.parametrize("change", QK_CHANGES)
@pytest.mark.parametrize("case", NORMED)
def test_norms_of_q_and_k_that_differ(lively, case, change):
    module, args, kwargs = built(case, lively)
    module.eval()
    ours = swapped(module)
    for _ in range(3):
        outcome(ours, args, kwargs, False, False)
    for model in (module, ours):
        for attention in list(norms_of_qk(model)):
            QK_CHANGES[change](attention)
    for model in (ours, swapped(module)):
        for grad in (False, False, False, True):
            want = outcome(module, args, kwargs, False, grad)
            assert want is not None
            assert not difference(outcome(model, args, kwargs, False, grad), want)


# ---- what is kept between calls ------------------------------------------------------------------


def rotations(tokens: int, dim: int) -> dict[str, torch.Tensor]:
    """Embeddings of rotation by the shapes in which timm passes them, with other angles each."""
    shapes = {"shared": (), "one more dim": (1, 1), "of heads": (2,), "of images": (2, 1)}
    made = {}
    for name, leading in shapes.items():
        angles = torch.randn(*leading, tokens - 1, dim // 2).repeat_interleave(2, -1)
        made[name] = torch.cat([angles.sin(), angles.cos()], -1)
    return made


@pytest.mark.parametrize("attention", ["eva", "rope"])
def test_a_rotation_of_another_shape_on_a_replay(lively, attention):
    """A replay is of the shapes of everything that goes in, not of x alone."""
    module = lively(eva.EvaBlock(C, 2, init_values=0.1, attn_type=attention)).eval()
    ours = swapped(module)
    x = (torch.randn(2, 10, C),)
    given = rotations(10, C // 2)
    for name in (*given, *reversed(given)):
        for _ in range(4):
            want = outcome(module, x, {"rope": given[name]}, False, False)
            got = outcome(ours, x, {"rope": given[name]}, False, False)
            assert want is not None and not difference(got, want), name


def scatter(conv: nn.Conv2d) -> None:
    """Its weight gets lines with gaps between them."""
    weight = conv.weight.detach()
    wide = weight.new_zeros(*weight.shape[:-2], weight.shape[-2] + 9, weight.shape[-1] + 9)
    view = wide[..., : weight.shape[-2], : weight.shape[-1]].copy_(weight)
    conv.weight = nn.Parameter(view)


@pytest.mark.parametrize(
    "case", ["convnext", "downsampling", "stem", "patch embed", "inception next", "grn mlp conv"]
)
def test_a_scattered_convolution_weight_edited_behind_pytorch(lively, case):
    """Its elements do not lie in one piece, where what is kept looks for them."""
    module, args, kwargs = built(case, lively)
    ours = swapped(module.eval())
    models = module, ours
    for path, conv in convolutions(module):
        for model in models:
            scatter(model.get_submodule(path))
        for channel in (-1, len(conv.weight) // 2):
            for _ in range(3):
                outcome(ours, args, kwargs, False, False)
            for model in models:
                model.get_submodule(path).weight.data[channel] += 1
            want = outcome(module, args, kwargs, False, False)
            why = difference(outcome(ours, args, kwargs, False, False), want)
            assert not why, f"{path}, channel {channel}: {why}"


@torch.no_grad()
def test_an_edit_that_pytorch_counts_is_seen_wherever_it_is():
    """Off the diagonal of a large weight, where only its version tells of it at once."""
    torch.manual_seed(0)
    dim = 160  # a weight of 100 KiB is not read whole on every call
    module = Block(dim, 2, qkv_bias=True).eval()
    ours, x = swapped(module), torch.randn(1, 3, dim)
    for i in range(40):
        for model in (module, ours):
            model.attn.proj.weight[(7 * i) % dim, (11 * i + 3) % dim] += 20
        torch.testing.assert_close(ours(x), module(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("rows", [31, 32, 33])
def test_no_packing_is_kept_for_many_rows(monkeypatch, rows):
    monkeypatch.setattr(weights_cache, "CACHE_ROWS", 32)
    monkeypatch.setattr(weights_cache, "CACHE_ELEMENTS", 0)
    weights_cache.clear_weight_cache()
    module = swapped(Block(C, 2, qkv_bias=True).eval())
    x = torch.randn(1, rows, C)
    for _ in range(3):
        module(x)
    made = [found for found in memo.memos() if any(t is module.norm1.weight for t in found.tensors)]
    assert len(made) == 1
    assert (len(weights_cache.CACHE) > 0) == (rows < 32)
    assert bool(made[0].prepared) == (rows < 32)
