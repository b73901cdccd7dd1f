"""Images and tokens that are a subclass of torch.Tensor: timm's results, and timm's classes."""

from __future__ import annotations

import types
import warnings

import pytest
import timm
import torch
from torch import nn

import vitfast
from vitfast import ops
from vitfast.layers import subclass

MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, depth=2, num_classes=5), 32),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=64, depths=(2, 2), num_classes=5), 64),
    "convnext": ("convnext_atto", dict(depths=(2, 1, 1, 1), num_classes=5), 64),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=56, depth=2, num_classes=5), 56),
    "hybrid": ("vit_tiny_r_s16_p8_224", dict(img_size=32, depth=2, num_classes=5), 32),
    "swin_v2": ("swinv2_tiny_window8_256", dict(img_size=64, depths=(2, 2), num_classes=5), 64),
    "naflex": ("naflexvit_base_patch16_gap", dict(depth=2, num_classes=5), 32),
}


class Named(torch.Tensor):
    """No rules."""

    def __repr__(self):
        return "Named()"


class Other(torch.Tensor):
    pass


class Forgetful(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class Ruled(torch.Tensor):
    """As fastai's: every operation passes here."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Overriding(torch.Tensor):
    def flatten(self, *args):
        return super().flatten(*args) * 2


@pytest.fixture(params=MODELS)
def pair(request):
    """timm's model and the same one, swapped; an image."""
    name, options, size = MODELS[request.param]
    torch.manual_seed(0)
    theirs = timm.create_model(name, **options).eval()
    ours = timm.create_model(name, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    assert vitfast.swap(ours).counts["swapped"]
    return theirs, ours, torch.randn(2, 3, size, size)


def fused_calls(monkeypatch, model, x) -> int:
    """How many of the layers that are blocks ran fused, by timm's forwards that did not run."""

    def watched(self, *args, **kwargs):
        RAN.append(self)  # noqa: F821
        return FORWARD(self, *args, **kwargs)  # noqa: F821

    ran = []
    blocks = [m for m in model.modules() if getattr(m, "role", "") == "block"]
    for kind in {type(m).timm_class for m in blocks}:
        # It claims to be timm's own: layers step aside for what others put there.
        space = {"__name__": "timm", "RAN": ran, "FORWARD": kind.forward}
        monkeypatch.setattr(kind, "forward", types.FunctionType(watched.__code__, space))
    model(x)
    monkeypatch.undo()
    return len(blocks) - len(ran)


@pytest.mark.parametrize("kind", [Named, Forgetful])
def test_a_subclass_without_rules_runs_fused(pair, kind, monkeypatch, needs_native):
    theirs, ours, x = pair
    named = x.as_subclass(kind)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):  # learn, record, replay
            want, got = theirs(named), ours(named)
            assert type(got) is type(want)
            torch.testing.assert_close(
                got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5
            )
        assert torch.equal(got.as_subclass(torch.Tensor), ours(x))
        assert fused_calls(monkeypatch, ours, named) == fused_calls(monkeypatch, ours, x) > 0


def test_a_subclass_without_rules_trains(pair):
    theirs, ours, x = pair
    grads = []
    for model in (theirs, ours):
        named = x.clone().as_subclass(Named).requires_grad_()
        model(named).sum().backward()
        grads.append((named.grad, *(p.grad for p in model.parameters())))
    assert type(grads[1][0]) is type(grads[0][0])
    for want, got in zip(*grads, strict=True):
        want, got = (g.as_subclass(torch.Tensor) for g in (want, got))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_one_with_rules_sees_what_timm_does_and_is_told_once(pair):
    theirs, ours, x = pair
    subclass.is_plain.cache_clear()
    with torch.no_grad():
        Ruled.seen.clear()
        want = theirs(x.as_subclass(Ruled))
        timms = list(Ruled.seen)
        Ruled.seen.clear()
        with pytest.warns(UserWarning, match="class Ruled, .*its own __torch_function") as w:
            got = ours(x.as_subclass(Ruled))
            ours(x.as_subclass(Ruled))
        assert Ruled.seen[: len(timms)] == timms
    assert type(got) is type(want) is Ruled and torch.equal(got, want)
    assert len(w) == 1


@pytest.mark.parametrize(
    ("kind", "plain"), [(Named, True), (Forgetful, True), (Overriding, False), (Ruled, False)]
)
def test_which_have_rules(kind, plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert subclass.is_plain(kind) is plain


def test_two_subclasses_at_once_are_torch_s_business():
    block = timm.layers.Attention(16, 2).eval()
    x = torch.randn(1, 4, 16).as_subclass(Named)
    mask = torch.zeros(1, 1, 4, 4).as_subclass(Other)
    with torch.no_grad(), pytest.raises(TypeError) as theirs:
        block(x, attn_mask=mask)
    vitfast.swap(block)
    with torch.no_grad(), pytest.raises(TypeError) as ours:
        block(x, attn_mask=mask)
    assert str(ours.value) == str(theirs.value)


def test_a_subclass_as_mask_alone():
    block = timm.layers.Attention(16, 2).eval()
    x, mask = torch.randn(1, 4, 16), torch.randn(1, 1, 4, 4).as_subclass(Named)
    with torch.no_grad():
        want = block(x, attn_mask=mask)
        vitfast.swap(block)
        ops.spec_of("attention").dispatcher.picked = None
        got = block(x, attn_mask=mask)
    assert type(got) is type(want) is Named and ops.spec_of("attention").dispatcher.picked
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


def test_a_hook_on_a_child_sees_the_subclass(pair):
    theirs, ours, x = pair
    seen: dict[int, list] = {0: [], 1: []}
    for i, model in enumerate((theirs, ours)):
        for child in model.modules():
            if type(child) is nn.Linear:
                child.register_forward_hook(
                    lambda module, args, out, i=i: seen[i].append(type(args[0]))
                )
        with torch.no_grad():
            model(x.as_subclass(Named))
    assert seen[0] == seen[1] and Named in seen[0]  # Swin V2 has tables of plain tensors
