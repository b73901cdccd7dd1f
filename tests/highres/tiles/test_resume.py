"""Tiles that fail, runs that are interrupted, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from vitfast.errors import InputValueError
from vitfast.highres import Box, TilingError, tiled, tiled_regions

BAD, WORSE = 777.0, 888.0
# Tiles of 32 pixels at 0, 24, 48, 68 (and 72, 96, 100 across).
SIZE = dict(tile=32, overlap=0.25)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(3, 100, 132, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bad(image) -> torch.Tensor:
    """With a pixel that only the tile at row 1, column 2 sees: rows 24:56, columns 48:80."""
    image[0, 40, 60] = BAD
    return image


@pytest.fixture
def hole() -> torch.Tensor:
    """The cells that only that tile covers: not the two that it shares to each side."""
    alone = torch.zeros(25, 33, dtype=torch.bool)
    alone[8:12, 14:18] = True
    return alone


# Failures


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_a_failed_tile_is_named_and_the_rest_is_kept(failing, picked, bad, hole, batch):
    whole = tiled(picked, bad, **SIZE)
    with pytest.raises(TilingError) as caught:
        tiled(failing(BAD), bad, batch=batch, **SIZE)
    [failed] = caught.value.failed
    assert failed[:3] == (1, 2, Box(24, 48, 56, 80)) and str(failed.error) == "a bad tile"
    assert failed.error.__traceback__ is None  # it would keep the model's activations
    assert str(caught.value) == (
        "1 of 24 tiles failed: row 1, column 2 (rows 24:56, columns 48:80): "
        "RuntimeError: a bad tile"
    )
    values = caught.value.values
    assert torch.equal(values.isnan(), hole.expand(3, -1, -1))
    assert torch.equal(values[:, ~hole], whole[:, ~hole])


def test_failures_can_be_kept(failing, bad, hole):
    bad[0, 90, 5] = WORSE
    result = tiled(failing(BAD, WORSE), bad, on_error="keep", **SIZE)
    assert [f[:2] for f in result.failed] == [(1, 2), (3, 0)]
    assert result.values[:, hole].isnan().all() and result.values[:, 20:, :6].isnan().any()
    with pytest.raises(TilingError, match="2 of 24 tiles failed: .*and 1 more"):
        tiled(failing(BAD, WORSE), bad, **SIZE)


def test_regions_name_the_failures_that_touch_them(failing, bad, hole):
    touched = []
    with pytest.raises(TilingError) as caught:
        for region, values in tiled_regions(failing(BAD), bad, **SIZE):
            touched.append(len(region.failed))
            assert torch.equal(values.isnan()[0], hole[region.cells])
    # Row 1's tiles begin where the first region ends; the third takes their last two cells.
    assert touched == [0, 1, 1, 0] and caught.value.values is None
    kept = list(tiled_regions(failing(BAD), bad, on_error="keep", **SIZE))
    assert len(kept) == 4


def test_a_vector_is_the_mean_of_the_tiles_that_did_not_fail(failing, image):
    def model(x):
        return failing(BAD)(x).mean((2, 3)) * 0 + 3

    image[0, 40, 60] = BAD
    result = tiled(model, image, on_error="keep", **SIZE)
    assert torch.equal(result.values, torch.full((3,), 3.0)) and len(result.failed) == 1
    image[:] = BAD
    nothing = tiled(lambda x: failing(BAD)(x).mean((2, 3)), image, on_error="keep", **SIZE)
    assert nothing.values.isnan().all() and len(nothing.failed) == 24


def test_a_whole_image_that_fails_is_a_failed_tile(failing, bad):
    with pytest.raises(TilingError, match=r"1 of 1 tiles failed: row 0, column 0"):
        tiled(failing(BAD), bad, 256)


def test_a_batch_that_fails_as_such_is_done_tile_by_tile(image, picked):
    def model(x):
        if len(x) > 1:
            raise RuntimeError("too many")
        return picked(x)

    assert torch.equal(tiled(model, image, **SIZE), image[:, ::4, ::4])


def test_a_frame_that_fails_is_named(failing, image, bad):
    frames = torch.stack([torch.zeros_like(bad), bad])
    with pytest.raises(TilingError, match="frame 1, row 1, column 2") as caught:
        tiled(failing(BAD), frames, **SIZE)
    assert caught.value.failed[0].frame == 1 and not caught.value.values[0].isnan().any()
    results = tiled(failing(BAD), iter(frames), **SIZE)
    next(results)
    with pytest.raises(TilingError, match="frame 1, row 1"):
        next(results)


def test_an_interrupt_is_no_failed_tile(image, tmp_path):
    calls = []

    def model(x):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        tiled(model, image, out=tmp_path / "x.npy", **SIZE)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


# Going on


def test_failed_tiles_are_done_again_and_no_others(failing, picked, bad, tmp_path):
    path, state = tmp_path / "x.npy", tmp_path / "state.json"
    where = dict(out=path, resume=state, batch=6, **SIZE)
    with pytest.raises(TilingError):
        tiled(failing(BAD), bad, **where)
    assert not path.exists() and json.loads(state.read_text())["bands"] == {"0": True, "3": True}
    out = tiled(failing(), bad, **where)
    assert np.array_equal(out, bad[:, ::4, ::4]) and path.exists()
    model = failing()
    again = tiled(model, bad, **where)
    assert np.array_equal(again, out) and len(model.batches) == 1  # which measured


@pytest.mark.parametrize("output", ["map", "vector"])
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_run_goes_on_where_it_stopped_with_the_same_bytes(image, tmp_path, output, stop):
    state, calls = tmp_path / "state.json", []

    def model(x):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        # Off by a value of the tile's own, so that every tile leaves its mark.
        return (x + x.mean((1, 2, 3), keepdim=True)) if output == "map" else x.mean((2, 3))

    def run(out):
        return tiled(model, image, batch=6, out=out, resume=state, **SIZE)

    limit = 0
    unbroken = tiled(model, image, batch=6, **SIZE)
    calls.clear()
    out = np.empty(tuple(unbroken.shape), np.float32)
    limit = stop  # the first call measures, then one for each of four rows
    with pytest.raises(KeyboardInterrupt):
        run(out)
    done = 0 if not state.exists() else len(json.loads(state.read_text())["bands"])
    assert done == stop - 2
    calls.clear()
    limit = 0
    run(out)
    assert np.array_equal(out, unbroken.numpy())
    # A map's next row takes the tiles above it once more.
    assert len(calls) == 1 + 4 - done + (output == "map" and done > 0)


KILLED = """
import os, signal, sys
import torch
from vitfast.highres import tiled

out, state, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
image = torch.randn(3, 100, 132, generator=torch.Generator().manual_seed(2))
calls = 0

def model(x):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return x + x.mean((1, 2, 3), keepdim=True)

tiled(model, image, 32, 0.25, 6, out=out, resume=state)
"""


def test_a_killed_process_leaves_a_run_that_goes_on(image, tmp_path):
    out, state = tmp_path / "x.npy", tmp_path / "s"
    command = [sys.executable, "-c", KILLED, str(out), str(state), "4"]
    assert subprocess.run(command, env=os.environ, timeout=300).returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "x.npy.part"]
    assert json.loads(state.read_text())["bands"] == {"0": True, "1": True}
    calls = []

    def model(x):
        calls.append(1)
        return x + x.mean((1, 2, 3), keepdim=True)

    tiled(model, image, batch=6, out=out, resume=state, **SIZE)
    assert len(calls) == 1 + 3  # rows 2 and 3, and 1 for what it shares with 2
    tiled(model, image, batch=6, out=tmp_path / "unbroken.npy", **SIZE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "unbroken.npy", "x.npy"]
    assert out.read_bytes() == (tmp_path / "unbroken.npy").read_bytes()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(overlap=0.5), "overlap"),
        (dict(tile=64), "tile"),
        (dict(blend="average"), "blend"),
        (dict(mean=0.5), "normalisation"),
        (dict(output=lambda m, x: m(x) + 1), "output"),
    ],
)
def test_the_state_of_another_run_is_refused(picked, image, tmp_path, change, named):
    out, state = np.empty((3, 25, 33), np.float32), tmp_path / "s"
    tiled(picked, image, out=out, resume=state, **SIZE)
    out[:] = -1
    with pytest.raises(InputValueError, match=f"of another run: {named} differ"):
        tiled(picked, image, out=out, resume=state, **SIZE | change)
    assert (out == -1).all()
    with pytest.raises(InputValueError, match="of another run: image, shape differ"):
        tiled(picked, image[:, :96], out=out, resume=state, **SIZE)


@pytest.mark.parametrize("at", [0, -1])
def test_other_weights_are_another_run(vit, image, tmp_path, at):
    state = tmp_path / "s"
    where = dict(tile=64, output="features", out=tmp_path / "x.npy", resume=state)
    tiled(vit, image, **where)
    before = vit.norm.bias.detach().clone()
    with torch.no_grad():
        vit.norm.bias[at] += 1
    try:
        with pytest.raises(InputValueError, match="of another run: weights differ"):
            tiled(vit, image, **where)
    finally:
        with torch.no_grad():
            vit.norm.bias.copy_(before)


def test_a_file_that_is_no_state_is_refused(picked, image, tmp_path):
    state = tmp_path / "s"
    for text in ("", "[]", '{"bands": {}}', "PNG"):
        state.write_text(text)
        with pytest.raises(InputValueError, match="is no state of a tiled run"):
            tiled(picked, image, out=np.empty((3, 25, 33), np.float32), resume=state, **SIZE)
        assert state.read_text() == text
    with pytest.raises(InputValueError, match="no such folder"):
        tiled(picked, image, out=tmp_path / "x.npy", resume=tmp_path / "no" / "s", **SIZE)


def test_rows_of_a_file_that_is_gone_are_done_again(picked, image, tmp_path):
    path, state = tmp_path / "x.npy", tmp_path / "s"
    tiled(picked, image, out=path, resume=state, **SIZE)
    path.unlink()
    assert np.array_equal(tiled(picked, image, out=path, resume=state, **SIZE), image[:, ::4, ::4])
