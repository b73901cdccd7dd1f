"""What is read, held and handed on while a run goes on; where results go; videos."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.highres import Box, TiledResult, tiled, tiled_regions

IMAGE = torch.randn(3, 100, 132, generator=torch.Generator().manual_seed(1))


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


# Threads


def test_two_runs_at_once_do_not_meet(vit):
    results = {}
    images = {i: torch.randn(3, 96, 96) for i in range(2)}

    def work(i):
        results[i] = tiled(vit, images[i], 64, output="features")

    threads = [threading.Thread(target=work, args=(i,)) for i in images]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, image in images.items():
        torch.testing.assert_close(results[i], tiled(vit, image, 64, output="features"))
