"""A swapped model trains as timm's own: same losses step by step, same parameters at the end."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import timm
import torch

import vitfast

STEPS = 30
FEW = 10  # of float16, for which CPUs have no fast products
LOSS_RTOL = 5e-6
MODELS = {
    "vit": dict(
        model_name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3,
        num_heads=3, num_classes=10, init_values=0.1, drop_path_rate=0.2,
    ),
    "eva02": dict(
        model_name="eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=48, depth=2,
        num_heads=3, num_classes=10,
    ),
    "swin": dict(
        model_name="swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4,
        embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10, drop_path_rate=0.2,
    ),
    "swin_v2": dict(
        model_name="swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4,
        embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10, drop_path_rate=0.2,
    ),
    "convnext": dict(
        model_name="convnext_tiny", patch_size=2, dims=(16, 24, 32, 48), depths=(1, 1, 2, 1),
        num_classes=10, drop_path_rate=0.2, ls_init_value=0.1,
    ),
    "convnext_v2": dict(
        model_name="convnextv2_atto", patch_size=2, dims=(16, 24, 32, 48), depths=(1, 1, 2, 1),
        num_classes=10,
    ),
}  # fmt: skip


def data():
    """Synthetic images of ten classes that a model can learn: a pattern each, and noise."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 32, 32, generator=g)
    labels = torch.randint(10, (STEPS, 8), generator=g)
    noise = torch.randn(STEPS, 8, 3, 32, 32, generator=g)
    return patterns[labels] + noise, labels


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The same model twice: as timm made it, and swapped."""
    torch.manual_seed(0)
    plain = timm.create_model(**MODELS[request.param]).train()
    swapped = copy.deepcopy(plain)
    report = vitfast.swap(swapped)
    assert report.swapped
    return plain, swapped


def train(model, dtype=None, checkpointing=False, scale=None, steps=STEPS):
    """Losses of the first steps of a fresh copy, and the copy. `scale`: where a GradScaler
    begins."""
    model = copy.deepcopy(model)
    if checkpointing:
        model.set_grad_checkpointing()
    # With the default eps a gradient that is zero but for rounding would make whole steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    losses = []
    torch.manual_seed(1)
    for images, labels in itertools.islice(zip(*data(), strict=True), steps):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses), model


@pytest.fixture(scope="module")
def plain_run(pair):
    return train(pair[0])


def test_it_learns(plain_run):
    losses, _ = plain_run
    assert losses[-5:].mean() < 0.92 * losses[:5].mean()


def test_float32_losses_and_parameters_follow_timm(pair, plain_run):
    losses, model = train(pair[1])
    torch.testing.assert_close(losses, plain_run[0], rtol=LOSS_RTOL, atol=0)
    wanted = dict(plain_run[1].named_parameters())
    for name, got in model.named_parameters():
        torch.testing.assert_close(got, wanted[name], rtol=1e-3, atol=2e-5, msg=name)


def test_bfloat16_autocast_follows_timm(pair, plain_run):
    losses, _ = train(pair[1], torch.bfloat16)
    timms, _ = train(pair[0], torch.bfloat16)
    torch.testing.assert_close(losses, timms, rtol=0.04, atol=0.04)
    # No further from float32 than timm in bfloat16 is, but for luck.
    ours, theirs = ((x - plain_run[0]).abs().mean() for x in (losses, timms))
    assert ours <= 2 * theirs + 5e-3


def test_float16_autocast_and_a_gradient_scaler_follow_timm(pair, plain_run):
    """The scale begins so large that gradients overflow: such steps are left out, as with timm."""
    losses, model = train(pair[1], torch.float16, scale=2.0**24, steps=FEW)
    timms, other = train(pair[0], torch.float16, scale=2.0**24, steps=FEW)
    assert losses.isfinite().all() and timms.isfinite().all()
    for trained in (model, other):
        assert all(p.isfinite().all() for p in trained.parameters())
    torch.testing.assert_close(losses, timms, rtol=0.02, atol=0.02)
    calm, _ = train(pair[1], torch.float16, scale=2.0**8, steps=FEW)
    assert not torch.equal(calm, losses), "no step was left out: nothing was tested"
    ours, theirs = (
        (x - plain_run[0][:FEW]).abs().mean()
        for x in (calm, train(pair[0], torch.float16, scale=2.0**8, steps=FEW)[0])
    )
    assert ours <= 2 * theirs + 2e-3


def test_gradient_checkpointing_changes_nothing(pair):
    losses, model = train(pair[1])
    again, other = train(pair[1], checkpointing=True)
    assert torch.equal(losses, again)
    for got, want in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_training_is_repeatable_bit_for_bit(pair):
    first, _ = train(pair[1])
    second, _ = train(pair[1])
    assert torch.equal(first, second)


def test_a_wrong_gradient_would_be_noticed(pair, plain_run, monkeypatch):
    """The comparison has teeth: gradients that are 1 % too large fail it."""
    for op in ("attention", "window_attention", "dwconv_norm"):
        backends = vitfast.ops.spec_of(op).dispatcher.backends
        for name, backend in list(backends.items()):

            def backward(*args, _backward=backend.backward):
                return tuple(g * 1.01 for g in _backward(*args))

            monkeypatch.setitem(backends, name, dataclasses.replace(backend, backward=backward))
    losses, _ = train(pair[1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses, plain_run[0], rtol=LOSS_RTOL, atol=0)


def test_a_training_step_in_pure_bfloat16(pair):
    """Gradients no further from float32 than timm's own in bfloat16, but for luck."""
    images, labels = (t[0] for t in data())

    def gradients(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        torch.manual_seed(2)
        loss = torch.nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)
        loss.backward()
        assert all(p.grad.dtype == dtype for p in model.parameters())
        return {name: p.grad.float() for name, p in model.named_parameters()}

    plain, swapped = pair
    exact = gradients(plain, torch.float32)
    theirs, ours = gradients(plain, torch.bfloat16), gradients(swapped, torch.bfloat16)
    for name, want in exact.items():
        allowed = 2 * (theirs[name] - want).norm() + 0.01 * want.norm() + 1e-4
        assert (ours[name] - want).norm() <= allowed, name
