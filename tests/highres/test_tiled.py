"""`tiled` and `tiled_regions`: what comes out is what the model would give for the whole image."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitfast
from vitfast.errors import InputTypeError, InputValueError, UnsupportedInputError
from vitfast.highres import Box, TiledResult, tiled, tiled_regions
from vitfast.highres.tiling import starts_of

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


def test_regions_leave_the_callers_modes_alone(picked):
    for _ in tiled_regions(picked, IMAGE, 32):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# Streaming


class Recorded:
    """An array that remembers which rows it was asked for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, height: int, width: int) -> None:
        self.shape, self.asked = (height, width, 3), []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.asked.append((rows.start, rows.stop))
        return np.full((rows.stop - rows.start, *self.shape[1:]), rows.start % 256, np.uint8)


def test_each_row_is_read_once_and_no_more_than_a_stripe_at_a_time(picked):
    image = Recorded(200, 64)
    tiled(picked, image, 32, 0.25)
    assert image.asked[0] == (0, 32) and image.asked[-1][1] == 200
    assert all(a[1] == b[0] for a, b in zip(image.asked, image.asked[1:], strict=False))
    assert max(b - a for a, b in image.asked) <= 32


def test_regions_are_the_result_in_order_and_come_as_soon_as_they_are_final(picked):
    whole = tiled(picked, IMAGE, 32, 0.25)
    picked.batches.clear()
    parts, calls = [], []
    for region, values in tiled_regions(picked, IMAGE, 32, 0.25, batch=8):
        assert torch.equal(whole[(..., *region.cells)], values)
        assert values.shape[1] * 4 == region.box.bottom - region.box.top
        parts.append(values)
        calls.append(len(picked.batches))
    assert torch.equal(torch.cat(parts, 1), whole)
    # The first call measures; then one for each row of six tiles.
    assert calls == [2, 3, 4, 5]
    regions = list(tiled_regions(picked, IMAGE, 132))
    assert [r.box for r, _ in regions] == [Box(0, 0, 100, 132)]


def test_regions_of_a_vector_are_one(vit):
    [(region, values)] = tiled_regions(vit, IMAGE, 64, output="pooled")
    assert region.cells == () and region.box == Box(0, 0, 100, 132)
    assert torch.equal(values, tiled(vit, IMAGE, 64, output="pooled"))


def test_progress_counts_tiles(picked):
    told = []
    tiled(picked, IMAGE, 32, 0.25, batch=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 24), (6, 24), (10, 24), (12, 24), (16, 24), (18, 24), (22, 24), (24, 24)]


def test_a_bar_is_for_terminals(picked, capsys):
    tiled(picked, IMAGE, 32, progress=True)
    assert capsys.readouterr() == ("", "")


def test_no_batch_is_larger_than_asked(picked):
    tiled(picked, IMAGE, 32, batch=3)
    assert max(len(b) for b in picked.batches) == 3


# Where it goes


@pytest.fixture
def expected(picked):
    return tiled(picked, IMAGE, 32).numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_out_is_an_array(picked, expected, dtype):
    out = np.full((3, 25, 33), np.nan, dtype)
    assert tiled(picked, IMAGE, 32, out=out) is out
    assert np.array_equal(out, expected.astype(dtype))


def test_out_is_a_tensor(picked, expected):
    out = torch.empty(3, 25, 33, dtype=torch.bfloat16)
    assert tiled(picked, IMAGE, 32, out=out) is out
    assert torch.equal(out, torch.from_numpy(expected).bfloat16())


def test_out_is_a_file_that_has_its_name_when_complete(picked, expected, tmp_path):
    path = tmp_path / "out.npy"
    during = []

    def progress(done, total):
        during.append((path.exists(), (tmp_path / "out.npy.part").exists()))

    out = tiled(picked, IMAGE, 32, out=path, progress=progress)
    assert set(during) == {(False, True)}
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    assert np.array_equal(np.load(path), expected) and np.array_equal(out, expected)


def test_out_is_a_function(picked, expected, tmp_path):
    asked = []

    def make(shape, dtype):
        asked.append((shape, dtype))
        return np.lib.format.open_memmap(str(tmp_path / "x.npy"), "w+", dtype, shape)

    assert np.array_equal(tiled(picked, IMAGE, 32, out=make), expected)
    assert asked == [((3, 25, 33), np.dtype(np.float32))]


def test_out_is_a_zarr(picked, expected, tmp_path):
    zarr = pytest.importorskip("zarr")
    out = zarr.create_array(str(tmp_path / "x"), shape=(3, 25, 33), chunks=(3, 8, 33), dtype="f4")
    tiled(picked, IMAGE, 32, out=out)
    assert np.array_equal(out[:], expected)


@pytest.mark.parametrize(
    "out, error, message",
    [
        (np.empty((3, 25, 32), np.float32), InputValueError, "shape .*25, 32.* output is .*25, 33"),
        (np.empty((3, 25, 33), np.int64), InputTypeError, "holds int64"),
        (torch.empty(3, 25, 33, dtype=torch.int8), InputTypeError, "holds torch.int8"),
        ("features.pt", InputValueError, "only .npy"),
        ("no/such/folder/x.npy", InputValueError, "no such folder"),
        (7, InputTypeError, "out is an array, a path or a function"),
    ],
)
def test_out_cannot_be_written(picked, out, error, message):
    with pytest.raises(error, match=message):
        tiled(picked, IMAGE, 32, out=out)


def test_out_is_read_only(picked):
    out = np.zeros((3, 25, 33), np.float32)
    out.flags.writeable = False
    with pytest.raises(InputValueError, match="read-only"):
        tiled(picked, IMAGE, 32, out=out)


# Videos


def test_an_iterator_of_frames_is_one_of_results(picked):
    taken = []

    def video():
        for i in range(3):
            taken.append(i)
            yield IMAGE + i

    results = tiled(picked, video(), 32, batch=5)
    assert taken == []
    first = next(results)
    assert taken == [0] and torch.equal(first, IMAGE[:, ::4, ::4])
    assert torch.equal(next(results), (IMAGE + 1)[:, ::4, ::4])
    # What tiles give is measured at the first frame only.
    sizes = [len(b) for b in picked.batches]
    assert sizes.count(1) == 1
    assert len(list(results)) == 1


def test_an_array_of_frames_is_an_array_of_results(picked):
    frames = torch.stack([IMAGE, IMAGE * 2])
    found = tiled(picked, frames, 32)
    assert torch.equal(found, frames[..., ::4, ::4])
    out = np.empty((2, 3, 25, 33), np.float32)
    assert tiled(picked, frames.numpy(), 32, out=out) is out
    assert np.array_equal(out, found.numpy())
    assert tiled(picked, iter(frames), 32, out=out) is out
    kept = tiled(picked, frames, 32, on_error="keep")
    assert isinstance(kept, TiledResult) and torch.equal(kept.values, found) and not kept.failed


def test_videos_that_cannot_be(picked, tmp_path):
    with pytest.raises(InputValueError, match="no frames"):
        tiled(picked, torch.empty(0, 3, 100, 132), 32)
    with pytest.raises(InputTypeError, match="out of a video is an array"):
        tiled(picked, iter([IMAGE]), 32, out=tmp_path / "x.npy")
    with pytest.raises(InputValueError, match="for frame 1"):
        tiled(picked, iter([IMAGE] * 2), 32, out=np.empty((1, 3, 25, 33), np.float32))
    with pytest.raises(InputValueError, match="resume is for one image"):
        tiled(picked, iter([IMAGE]), 32, resume=tmp_path / "x")
    with pytest.raises(InputValueError, match="regions are of one image"):
        next(tiled_regions(picked, IMAGE[None], 32))


# What cannot be


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(overlap=1.0), InputValueError, "overlap=1.0 must be a share"),
        (dict(tile=0), InputValueError, "below 1 pixel"),
        (dict(tile=8), InputValueError, "tile=8 is less than the 16 pixels"),
        (dict(batch=0), InputValueError, "batch=0 must be at least 1"),
        (dict(batch=None), InputTypeError, "batch is a whole number"),
        (dict(stride=1.5), InputTypeError, "stride is a whole number"),
        (dict(margin=-1), InputValueError, "margin=-1 must be at least 0"),
        (dict(margin=64), InputValueError, "margin=64 takes an overlap of twice"),
        (dict(blend="gaussian"), InputValueError, "blend='gaussian' is none of cosine, average"),
        (dict(output="tokens"), InputValueError, "output='tokens' is none of features"),
        (dict(output=7), InputTypeError, "output is a name or a function"),
        (dict(layout="NHWC"), InputValueError, "layout='NHWC' is none of auto"),
        (dict(on_error="ignore"), InputValueError, "neither 'raise' nor 'keep'"),
        (dict(mean=(0.5, 0.5)), InputValueError, "mean has 2 values for images of 3"),
        (dict(mean=0.5, transform=lambda x: x), InputValueError, "not both"),
        (dict(transform=lambda x: x[..., ::2, ::2]), InputValueError, "transform must keep"),
        (dict(resume="state.json", output="features"), InputValueError, "resume needs an out"),
    ],
)
def test_bad_options_are_one_sentence(vit, options, error, message):
    with pytest.raises(error, match=message) as caught:
        tiled(vit, IMAGE, **{"tile": 64} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, options, error, message",
    [
        (lambda x: x.mean((2, 3)), dict(output="features"), InputTypeError, "forward_intermediate"),
        (nn.Identity().eval(), dict(output="pooled"), InputTypeError, "forward_features and"),
        (lambda x: x, dict(output="logits"), UnsupportedInputError, "a vector .* was asked for"),
        (lambda x: x.flatten(2), {}, UnsupportedInputError, "neither a map"),
        (lambda x: x.argmax(1), {}, UnsupportedInputError, "neither a map"),
        (lambda x: x[:0], {}, UnsupportedInputError, "neither a map"),
        (lambda x: (x, x), {}, UnsupportedInputError, "one tensor, not a tuple"),
        (lambda x: x[..., 1:-1, 1:-1], {}, UnsupportedInputError, "no fixed fraction"),
        (lambda x: x[..., ::4, ::4][..., 1:, 1:], {}, UnsupportedInputError, "no fixed fraction"),
        (lambda x: x[..., ::11, ::11], {}, UnsupportedInputError, "any stride from 10 to 12"),
        (nn.Identity(), {}, InputValueError, "training mode"),
        (None, {}, InputTypeError, "a NoneType cannot be"),
    ],
)
def test_a_model_without_such_an_output_is_one_sentence(model, options, error, message):
    with pytest.raises(error, match=message) as caught:
        tiled(model, IMAGE, 64, **options)
    assert "\n" not in str(caught.value)


def test_a_vector_for_an_out_that_holds_a_map(vit):
    with pytest.raises(InputValueError, match="shape .* output is"):
        tiled(vit, IMAGE, 64, out=np.empty((7, 7, 9), np.float32))


def test_a_model_of_a_fixed_size_names_it():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    with pytest.raises(InputValueError, match=r"refused a tile of 512 x 512.*give tile=\(64, 64\)"):
        tiled(model, IMAGE)
    assert tiled(model, IMAGE[:, :40, :50], 64, output="features").shape[1:] == (3, 4)


def test_a_stride_is_found_where_a_model_does_not_tell():
    def model(x):  # a stem that rounds up, as ResNet's
        return nn.functional.max_pool2d(x, 1, 16)

    image = torch.randn(3, 530, 700)
    # 500 is no multiple of 16: 32 cells, which no other stride gives.
    assert torch.equal(tiled(model, image, 500, 0.25), image[:, ::16, ::16])
    with pytest.raises(UnsupportedInputError, match="give stride="):
        tiled(model, image, 100)
    assert torch.equal(tiled(model, image, 100, stride=16), image[:, ::16, ::16])


def test_a_tile_of_no_multiple_is_cut_to_one(vit):
    found = tiled(vit, IMAGE, 70, output="features")
    assert torch.equal(found, tiled(vit, IMAGE, 64, output="features"))


def test_two_runs_at_once_do_not_meet(vit):
    results = {}
    images = {i: torch.randn(3, 96, 96) for i in range(2)}

    def work(i):
        results[i] = tiled(vit, images[i], 64, output="features")
        time.sleep(0)

    threads = [threading.Thread(target=work, args=(i,)) for i in images]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, image in images.items():
        torch.testing.assert_close(results[i], tiled(vit, image, 64, output="features"))
