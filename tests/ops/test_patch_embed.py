"""What holds for patch_embed beyond single samples: stretches, layouts, bytes, timm's tokens."""

from __future__ import annotations

import pytest
import timm
import torch

from vitfast.ops import patch_embed
from vitfast.ops.patch_embed import native

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
pytestmark = pytest.mark.usefixtures("needs_native")


def make(*shape, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


@pytest.fixture
def arguments(dtype):
    """Five images of 6 x 5 patches, three prefix tokens."""
    return {
        "image": make(5, 3, 24, 20, dtype=dtype),
        "weight": make(10, 3, 4, 4, dtype=dtype, seed=1, scale=0.2),
        "bias": make(10, dtype=dtype, seed=2),
        "pos_embed": make(1, 33, 10, dtype=dtype, seed=3),
        "prefix": make(1, 3, 10, dtype=dtype, seed=4),
    }


def train(arguments):
    """Tokens, and the gradient of every floating argument."""
    leaves = {
        n: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for n, t in arguments.items()
    }
    tokens = patch_embed(**leaves, backend="cpu")
    tokens.backward(make(*tokens.shape, dtype=tokens.dtype, seed=9))
    return tokens.detach(), *(t.grad for t in leaves.values())


# ---- stretches -----------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("most", [1, 7, 30, 64, 100])
def test_stretches_change_no_bit_of_the_tokens(arguments, monkeypatch, most):
    whole = train(arguments)
    width = 48 * arguments["image"].itemsize
    monkeypatch.setattr(native, "_STRETCH_BYTES", most * width)
    monkeypatch.setattr(native, "_LEAST_ROWS", 1)
    monkeypatch.setattr(native, "_MOST_SUMMED", most)
    parts = train(arguments)
    assert torch.equal(parts[0], whole[0])
    for part, all_of_it in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(part, all_of_it)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((1, 3, 2160, 3840), 16), ((300, 3, 32, 32), 8), ((3, 1, 640, 8), 8), ((2, 500, 64, 64), 32)],
)
def test_stretches_cover_every_patch_once_and_stay_small(shape, patch):
    image = torch.empty(shape, device="meta")
    weight = torch.empty(5, shape[1], patch, patch, device="meta")
    patches = native.Patches(image, weight, None, None, torch.float32)
    seen = []
    for images, part in patches.stretches():
        rows = (images.stop - images.start) * (part.stop - part.start)
        least = 64 * patches.width * 4
        assert rows * patches.width * 4 <= max(native._STRETCH_BYTES, least)
        first = images.start * patches.per_image + part.start
        seen += range(first, first + rows)
    assert seen == list(range(patches.rows))


# ---- layouts and bytes ---------------------------------------------------------------------------


@each_dtype
def test_any_layout_gives_the_same_bits(arguments):
    want = train(arguments)
    image = arguments["image"]
    padded = torch.full((5, 3, 30, 27), float("nan"), dtype=image.dtype)
    padded[:, :, 3:27, 5:25] = image
    for other in (
        image.contiguous(memory_format=torch.channels_last),
        padded[:, :, 3:27, 5:25],
        image.mT.contiguous().mT,
        image.flip(0).flip(0),
    ):
        for got, wanted in zip(train({**arguments, "image": other}), want, strict=True):
            assert torch.equal(got, wanted)


def test_bytes_are_scaled_images():
    g = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=g)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    weight, bias = make(12, 3, 16, 16, scale=0.05), make(12)
    got = patch_embed(bytes_, weight, bias, mean=mean, std=std, backend="cpu")
    wide = [torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std)]
    image = (bytes_.double() / 255 - wide[0]) / wide[1]
    want = torch.nn.functional.conv2d(image, weight.double(), bias.double(), stride=16)
    torch.testing.assert_close(got.double(), want.flatten(2).mT, rtol=1e-5, atol=1e-5)
    again = patch_embed(
        bytes_.contiguous(memory_format=torch.channels_last),
        weight,
        bias,
        mean=torch.tensor(mean),
        std=list(std),
        backend="cpu",
    )
    assert torch.equal(again, got)


@each_dtype
def test_an_image_depends_on_no_other(arguments):
    tokens = patch_embed(**arguments, backend="cpu")
    for b in range(5):
        one = {**arguments, "image": arguments["image"][b : b + 1]}
        assert torch.equal(patch_embed(**one, backend="cpu"), tokens[b : b + 1])


@each_dtype
def test_a_nan_pixel_spoils_its_own_token_only(arguments):
    arguments["image"][2, 1, 9, 6] = float("nan")  # patch row 2, column 1
    spoiled = patch_embed(**arguments, backend="cpu").isnan().any(-1).nonzero().tolist()
    assert spoiled == [[2, 3 + 2 * 5 + 1]]


# ---- timm ----------------------------------------------------------------------------------------


def timms(model, image):
    return model._pos_embed(model.patch_embed(image))


def ours(model, image):
    prefix = [t for t in (model.cls_token, model.reg_token) if t is not None]
    proj = model.patch_embed.proj
    return patch_embed(
        image,
        proj.weight,
        proj.bias,
        pos_embed=model.pos_embed,
        prefix=torch.cat(prefix, 1) if prefix else None,
        backend="cpu",
    )


@pytest.mark.parametrize("options", [
    {},
    {"reg_tokens": 4},
    {"reg_tokens": 4, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"patch_size": 14, "img_size": 56, "in_chans": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_are_timms(options, autocast):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    options = sizes | options
    model = timm.models.VisionTransformer(**options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    size = options["img_size"]
    image = make(3, options.get("in_chans", 3), size, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = ours(model, image), timms(model, image)
    assert got.dtype == want.dtype == torch.float32
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_out_dtype_is_obeyed():
    image, weight = make(1, 3, 8, 8), make(4, 3, 4, 4)
    whole = patch_embed(image, weight)
    low = patch_embed(image, weight, out_dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, whole.bfloat16())
    assert patch_embed(image.bfloat16(), weight.bfloat16(), pos_embed=make(1, 4, 4)).dtype == (
        torch.float32
    )
