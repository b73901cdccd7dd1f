"""`tiled` and `tiled_regions`: what comes out is what the model would give for the whole image."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitfast
from vitfast.highres import tiled, tiled_regions
from vitfast.highres.tiles.tiling import starts_of

IMAGE = torch.randn(3, 100, 132, generator=torch.Generator().manual_seed(1))
PIXELS = (IMAGE * 50 + 128).clamp(0, 255).byte()


def convolutions(upscale: bool = False) -> nn.Module:
    """Equivariant on multiples of 4 pixels; sees 15 pixels to each side."""
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.GELU(),
        nn.Conv2d(8, 5, 3, padding=1),
    ]
    if upscale:
        layers.append(nn.Upsample(scale_factor=8, mode="nearest"))
    return nn.Sequential(*layers).eval()


# What comes out


@pytest.mark.parametrize("blend", ["cosine", "average"])
@pytest.mark.parametrize("tile, overlap", [(32, 0.25), (48, 0.7), ((64, 32), 0), (20, 0.1)])
def test_constant_and_linear_fields_are_exact(picked, blend, tile, overlap):
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(132.0), indexing="ij")
    for field in (torch.full((100, 132), 0.1), 0.37 * rows - 1.3 * columns + 0.1):
        image = field.expand(3, -1, -1)
        assert torch.equal(tiled(picked, image, tile, overlap, blend=blend), image[:, ::4, ::4])


@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize("size", [(160, 232), (96, 128)])
@pytest.mark.parametrize("cut", [(80, 0.8), (64, 0.5, 16)])
def test_an_equivariant_model_equals_the_untiled_one(upscale, size, cut):
    model = convolutions(upscale)
    image = torch.randn(3, *size)
    whole = model(image[None])[0]
    tile, overlap, *margin = cut
    found = tiled(model, image, tile, overlap, margin=margin[0] if margin else None)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    # The tiles' own edges do see their padding: it is the margin that keeps it out.
    edges = tiled(model, image, tile, overlap, blend="average")
    assert (edges - whole).abs().max() > 1e-3


def test_there_is_no_seam():
    def drifting(x):  # each tile is off by a value of its own
        return torch.full_like(x[:, :1], 0.0) + x[:, :, :1, :1].mean()

    image = torch.randn(3, 96, 160)

    def largest_jump(overlap, **how):
        found = tiled(drifting, image, 64, overlap, batch=1, **how)[0]
        return max(found.diff(dim=d).abs().max().item() for d in (0, 1))

    hard = largest_jump(0.5, blend="average")
    ramp = 32 - 2 * 8  # pixels: half of the overlap
    assert largest_jump(0.5) < 2 * hard * 2 * (torch.pi / 2 / ramp)
    assert largest_jump(0.5, margin=0) < 2 * hard * 2 * (torch.pi / 2 / 32)
    assert largest_jump(0.5, margin=16) > 0.5 * hard


@pytest.mark.parametrize("size", [(64, 96), (16, 16), (128, 128)])
@pytest.mark.parametrize("output", [None, "features", "pooled", "logits"])
def test_a_window_over_the_whole_image_is_the_untiled_call(vit, size, output):
    image = torch.randn(3, *size)
    with torch.no_grad():
        whole = {
            None: lambda: vit(image[None]),
            "logits": lambda: vit(image[None]),
            "pooled": lambda: vit.forward_head(vit.forward_features(image[None]), pre_logits=True),
            "features": lambda: vit.forward_intermediates(
                image[None], indices=1, norm=True, intermediates_only=True
            )[-1],
        }[output]()[0]
    found = tiled(vit, image, tile=128, output=output)
    assert torch.equal(found, whole) and not found.is_inference()
    if output is None or whole.ndim == 1:
        return
    out = np.empty(tuple(whole.shape), np.float32)
    assert tiled(vit, image, 128, output=output, out=out) is out
    assert np.array_equal(out, whole.numpy())


def test_the_whole_image_is_one_call(picked):
    tiled(picked, IMAGE, 132)
    assert [tuple(b.shape) for b in picked.batches] == [(1, 3, 100, 132)]
    assert torch.equal(picked.batches[0][0], IMAGE)


def test_one_tile_that_had_to_be_padded_is_as_the_model_pads(vit):
    padding = vitfast.create_model(
        "test_vit", dynamic_img_size=True, dynamic_img_pad=True, depth=2, num_classes=7
    )
    padding.load_state_dict(vit.state_dict())
    with torch.no_grad():
        whole = padding.eval()(IMAGE[None])[0]
    torch.testing.assert_close(tiled(vit, IMAGE, 512), whole)


@pytest.mark.parametrize(
    "name, options, tile, multiple",
    [
        ("test_vit", dict(dynamic_img_size=True), 64, 16),
        ("test_vit", dict(img_size=64), 64, 16),
        ("test_convnext", {}, 64, 32),
        ("swin_tiny_patch4_window7_224", dict(img_size=64, depths=(1, 1, 1, 1)), 64, 32),
    ],
)
@pytest.mark.parametrize("swapped", [True, False])
def test_features_of_each_family_lie_where_their_tiles_say(name, options, tile, multiple, swapped):
    create = vitfast.create_model if swapped else timm.create_model
    model = create(name, num_classes=0, **options).eval()
    image = torch.randn(3, 96, 125)
    found = tiled(model, image, tile, overlap=0.0, blend="average", output="features")
    assert found.shape[1:] == (96 // multiple, -(-125 // multiple))
    # The corner of the image, which one tile alone covers.
    with torch.no_grad():
        first = model.forward_intermediates(
            image[None, :, :tile, :tile], indices=1, norm=True, intermediates_only=True
        )[-1][0]
    alone = (128 - tile) // multiple
    torch.testing.assert_close(found[:, :1, :alone], first[:, :1, :alone], rtol=1e-4, atol=1e-4)
    assert tiled(model, image, tile, output="pooled").shape == (model.num_features,)


def test_logits_are_those_of_the_tiles_each_for_its_area():
    image = torch.randn(3, 96, 176)

    def model(x):
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3)), torch.ones(len(x))], 1)

    found = tiled(model, image, 64, overlap=0.25, blend="average")
    rows, columns = starts_of(96, 64, 0.25, 1), starts_of(176, 64, 0.25, 1)
    boxes = [(slice(y, y + 64), slice(x, x + 64)) for y in rows for x in columns]
    covered = torch.zeros(96, 176)
    for box in boxes:
        covered[box] += 1
    shares = torch.tensor([(1 / covered[box]).sum() for box in boxes]) / (96 * 176)
    values = torch.cat([model(image[(None, slice(None), *box)]) for box in boxes])
    torch.testing.assert_close(found, shares @ values)
    assert found[2] == 1
    exact = tiled(model, image[:, :64, :128], 64, overlap=0)
    torch.testing.assert_close(exact[0], image[:, :64, :128].mean())


# Pixels and precision


def test_pixels_become_floats_one_batch_at_a_time():
    given = []

    def transform(x):
        given.append(x)
        return x.float()

    tiled(lambda x: x, PIXELS, 32, 0.25, transform=transform)
    assert {(x.dtype, x.shape[1:]) for x in given} == {(torch.uint8, (3, 32, 32))}


def test_pixels_are_normalised_as_the_weights_ask_or_the_caller(vit):
    def normalised(mean, std):
        mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        return ((PIXELS / 255) - mean) / std

    cfg = vit.pretrained_cfg
    own = tiled(vit, normalised(cfg["mean"], cfg["std"]), 64, output="features")
    assert torch.equal(tiled(vit, PIXELS, 64, output="features"), own)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    asked = tiled(vit, normalised(mean, std), 64, output="features")
    assert torch.equal(tiled(vit, PIXELS, 64, output="features", mean=mean, std=std), asked)
    assert not torch.equal(own, asked)


def test_sixteen_bits_and_bytes_are_one_scale():
    deep = (PIXELS.int() * 257).to(torch.uint16)
    pick = tiled(lambda x: x, PIXELS, 32)
    torch.testing.assert_close(tiled(lambda x: x, deep, 32), pick)
    assert pick.max() <= 1 and torch.equal(pick, PIXELS / 255)


def test_padding_is_zero_after_normalisation():
    seen = []

    def model(x):
        seen.append(x)
        return x[..., ::16, ::16]

    found = tiled(model, PIXELS, 64, stride=16, mean=(9.0,) * 3)
    assert found.shape == (3, 7, 9)
    last = seen[-1][-1]  # rows 48:112 and columns 80:144 of 100 x 132
    assert last[:, 52:].eq(0).all() and last[..., 52:].eq(0).all()
    assert last[:, :52, :52].lt(-7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_models_dtype_is_the_outputs(dtype):
    model = convolutions().to(dtype)
    image = torch.randn(3, 96, 128)
    found = tiled(model, image, 80, 0.8)
    assert found.dtype == dtype
    whole = model(image[None].to(dtype))[0]
    # Sums are in float32 in any case.
    torch.testing.assert_close(found.float(), whole.float(), rtol=0, atol=2e-2)
    assert tiled(model, PIXELS, 80, out=np.empty((5, 25, 33), np.float32)).dtype == np.float32


def test_autocast_is_honoured_and_no_gradient_kept():
    seen = []

    def model(x):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return x * torch.ones(1, requires_grad=True)

    with torch.autocast("cpu", torch.bfloat16):
        found = tiled(model, IMAGE, 64)
    assert set(seen) == {(True, True)} and not found.requires_grad and not found.is_inference()


@pytest.mark.parametrize("tile", [32, 132])
def test_regions_can_be_computed_with(tile):
    for _, values in tiled_regions(lambda x: x + 1, IMAGE, tile):
        assert not values.is_inference()


def test_regions_leave_the_callers_modes_alone(picked):
    for _ in tiled_regions(picked, IMAGE, 32):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_all_stays_where_it_is_whatever_the_default_device(vit):
    with torch.device("cpu"):
        image, model = torch.randn(3, 96, 130), convolutions()
    found = [tiled(model, image, 64), tiled(vit, PIXELS, 64)]
    with torch.device("meta"):
        again = [tiled(model, image, 64), tiled(vit, PIXELS, 64)]
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)
