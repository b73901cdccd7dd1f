"""`tiled` and `tiled_regions`: images of any size through a model that takes tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.highres.tiles.bars import Progress, tile_bar
from vitfast.highres.tiles.blending import Blend, WeightedMean
from vitfast.highres.tiles.outputs import Output, PerChannel, Predictor, Transform
from vitfast.highres.tiles.readers import open_source
from vitfast.highres.tiles.sinks import FileSink, Finished, Out, open_sink
from vitfast.highres.tiles.sources import frames_of
from vitfast.highres.tiles.streaming import Band, FailedTile, Plan, TilingError, Whole, plan_tiles
from vitfast.highres.tiles.tiling import Box, check_overlap, check_tile
from vitfast.loading import weights_sha256


class TiledResult(NamedTuple):
    """What `tiled(..., on_error="keep")` gives."""

    values: Any
    """The output, or `out`."""
    failed: tuple[FailedTile, ...]
    """Tiles for which the model raised; NaN where no other tile covers them."""


class Region(NamedTuple):
    """A part of the output that is final."""

    cells: tuple[slice, ...]
    """Its rows and columns in the output's map; () of a pooled output."""
    box: Box
    """Its pixels in the image."""
    failed: tuple[FailedTile, ...]
    """Failed tiles that cover some of it."""


def tiled(
    model: Any,
    image: Any,
    tile: int | tuple[int, int] = 512,
    overlap: float = 0.1,
    batch: int = 4,
    blend: str = "cosine",
    out: Out = None,
    *,
    output: str | Output | None = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    transform: Transform | None = None,
    layout: str = "auto",
    stride: int | None = None,
    margin: int | None = None,
    on_error: str = "raise",
    resume: str | os.PathLike[str] | None = None,
    progress: bool | Progress = False,
) -> Any:
    """A model's output for an image of any size, computed by overlapping tiles.

    Maps are blended where tiles overlap; vectors (pooled features, logits) become their mean over
    the image, every pixel counting once. Where the tiles agree, the result is what they agree on to
    the last bit. An image that one tile covers is given to the model as it is, in one call whose
    output is handed on untouched.

    Memory is bounded by a stripe, not by the image: `tile` rows of the input in the image's own
    dtype, `tile` rows of the output in float32, one batch, and the result where `out` is None.

    Args:
        model: a module in evaluation mode, swapped or not, on any device and in any dtype, or a
            callable on batches [B, C, H, W]. It is called without gradients; autocast is honoured.
        image: one of
            - an array [H, W, C], [C, H, W] or [H, W]: NumPy's, a memory map, zarr's, or any with a
              shape, a dtype and slices; a tensor [C, H, W] or [H, W]; Pillow's image;
            - a path, read by pyvips or tifffile where they are installed, else by Pillow;
            - a video: an array or tensor of four axes, or an iterator, list or tuple of frames.

            Pixels are uint8, uint16 (65535 is 1) or floating. For a model of three channels grey is
            repeated and an alpha channel dropped, as Pillow's convert("RGB") does.
        tile: pixels a side, or (height, width); cut to a multiple of what the model's stride is.
        overlap: share of a tile that neighbours have in common at least, from 0 to below 1. Tiles
            lie on multiples of the model's stride, the last ones are moved inwards. Where the image
            is no multiple it is padded by zeros after normalisation, as timm pads.
        batch: tiles per call; those of one row of tiles only.
        blend: "cosine", weights that fade to each side by a raised cosine, or "average".
        out: where the result goes: None, an array of the output's shape (with the frames before
            it), the path of an .npy file, or a function (shape, NumPy dtype) -> array. Only
            finished rows are written. A file is called `<name>.part` until it is complete.
        output: what is asked of the model: None, model(batch); "features", a timm model's last
            feature map; "pooled", its vector before the classifier; "logits"; or a function
            (model, batch) -> [B, C, h, w], whose h and w are a fixed fraction of the tile's, or
            [B, C].
        mean, std: [C] or one value, of pixels scaled to [0, 1]. By default integer pixels take
            those of the model's weights (its `pretrained_cfg`; 0 and 1 where it has none), and
            floating ones are normalised already.
        transform: instead, a function from pixels as they are, a tensor [B, C, H, W] on the model's
            device, to the model's input. Tiles stay as they are until then.
        layout: "HWC" or "CHW" where "auto" cannot know: more than four channels, say. "auto" takes
            tensors for CHW and arrays for HWC unless only the first axis can be channels.
        stride: pixels that tiles are to lie on multiples of; by default found from timm's
            attributes and the size of the output. Of use where a network's own grid is coarser than
            its output, as a U-Net's.
        margin: pixels along the edges that tiles share which are not to count, for there a model
            sees the tile's padding; by default a quarter of the overlap ("cosine") or none. A
            convolutional network that sees this many pixels to each side gives what it would for
            the whole image, if the overlap is at least twice that.
        on_error: what to do when the model raises for some tiles and all others are done: "raise"
            TilingError, or "keep": return a `TiledResult`.
        resume: path of a small JSON file that says which rows are finished. The same call goes on
            where it was interrupted, does failed tiles again, and ends with the same bytes. It
            needs an `out` that is still there, or a pooled output; one image, no video.
        progress: True for a bar on stderr, if that is a terminal; or a function (tiles done, of how
            many).

    Returns:
        A tensor [C, h, w] or [C] on the CPU, in the dtype of the model's output, or `out`; with a
        fourth axis in front for a video in an array; for an iterator, list or tuple of frames an
        iterator of results, each computed as it is asked for. (In a `TiledResult`, if failures are
        to be kept.)

    Raises:
        InputTypeError, InputValueError, UnsupportedInputError: an image, model or option that
            cannot be, in one sentence; nothing was written, except where an image file turns out to
            be broken further down than the rows that are done.
        TilingError: the model raised for some tiles.
    """
    keep = _is_to_keep(on_error)
    cut = _Cut.of(tile, overlap, batch, blend, layout, stride, margin)
    predictor = Predictor(model, output, mean, std, transform)
    frames = frames_of(image)
    if frames is None:
        plan = cut.plan(image, predictor)
        try:
            about = {} if resume is None else cut.about(plan, predictor, output)
            return _fill(plan, out, (), Finished(resume, about), resume, progress, keep)
        finally:
            plan.source.close()
    if resume is not None:
        raise InputValueError("resume is for one image; go on with a video at its first new frame")
    if out is not None and not hasattr(out, "shape"):
        raise InputTypeError("out of a video is an array, whose first axis counts the frames")
    if hasattr(image, "shape") or out is not None:
        results = _video(cut, frames, predictor, out, progress, keep=True)
        return _stacked(results, image.shape[0] if out is None else 0, out, keep)
    return _video(cut, frames, predictor, None, progress, keep)


def tiled_regions(
    model: Any,
    image: Any,
    tile: int | tuple[int, int] = 512,
    overlap: float = 0.1,
    batch: int = 4,
    blend: str = "cosine",
    *,
    output: str | Output | None = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    transform: Transform | None = None,
    layout: str = "auto",
    stride: int | None = None,
    margin: int | None = None,
    on_error: str = "raise",
    progress: bool | Progress = False,
) -> Iterator[tuple[Region, torch.Tensor]]:
    """The parts of `tiled`'s result, each as soon as no further tile can change it.

    A map comes in stripes of its full width from top to bottom, `whole[(..., *region.cells)]` of
    what `tiled` gives; a pooled output comes at the end, as one region. Nothing is computed before
    it is asked for, and memory is bounded as in `tiled`.

    Args:
        See `tiled`; the image is one, no video.

    Yields:
        (region, values): values [C, rows, w], or [C].

    Raises:
        What `tiled` raises, at the first region; TilingError, after the last, unless `on_error` is
        "keep". `Region.failed` names the failed tiles in any case.
    """
    keep = _is_to_keep(on_error)
    if frames_of(image) is not None:
        raise InputValueError("regions are of one image; call this for each frame of a video")
    cut = _Cut.of(tile, overlap, batch, blend, layout, stride, margin)
    predictor = Predictor(model, output, mean, std, transform)
    plan = cut.plan(image, predictor)
    try:
        failed: dict[FailedTile, None] = {}
        bands = []
        with tile_bar(progress, _tiles(plan, set(range(plan.bands)))) as advance:
            for band in plan.run(set(range(plan.bands)), advance):
                failed |= dict.fromkeys(band.failed)
                if len(plan.shape) == 1:
                    bands.append((band.weight, band.values))
                else:
                    yield _region(plan, band), band.values
            if bands:
                box = Box(0, 0, plan.source.height, plan.source.width)
                yield Region((), box, tuple(failed)), _merged(plan, bands)
        if failed and not keep:
            raise TilingError(tuple(failed), plan.tiles)
    finally:
        plan.source.close()


def _is_to_keep(on_error: str) -> bool:
    if on_error not in ("raise", "keep"):
        raise InputValueError(f"on_error={on_error!r} is neither 'raise' nor 'keep'")
    return on_error == "keep"


class _Cut(NamedTuple):
    """How images are to be cut."""

    tile: tuple[int, int]
    overlap: float
    stride: int | None
    batch: int
    blend: Blend
    layout: str

    @classmethod
    def of(
        cls,
        tile: int | tuple[int, int],
        overlap: float,
        batch: int,
        blend: str,
        layout: str,
        stride: int | None,
        margin: int | None,
    ) -> _Cut:
        """Arguments as `tiled` takes them."""
        sides, share = check_tile(tile), check_overlap(overlap)
        return cls(sides, share, stride, batch, Blend(blend, margin), layout)

    def plan(self, image: Any, predictor: Predictor) -> Plan | Whole:
        source = open_source(image, self.layout)
        try:
            source.select(predictor.channels)
            return plan_tiles(source, predictor, *self[:5])
        except BaseException:
            source.close()
            raise

    def about(self, plan: Plan | Whole, predictor: Predictor, output: Any) -> dict[str, Any]:
        """What a run is, for `Finished`: not the batch, which a run may go on with another."""
        source = plan.source
        name = output if isinstance(output, str) else getattr(output, "__qualname__", str(output))
        return {
            "image": [source.height, source.width, source.channels, str(source.dtype)],
            "file": source.identity,
            "tile": self.tile,
            "overlap": self.overlap,
            "stride": self.stride,
            "blend": self.blend,
            "output": name if output is not None else "",
            "shape": plan.shape,
            "normalisation": predictor.normalisation,
            "weights": "" if predictor.module is None else weights_sha256(predictor.module),
        }


def _fill(
    plan: Plan | Whole,
    out: Out,
    index: tuple[int, ...],
    finished: Finished,
    resume: Any,
    progress: bool | Progress,
    keep: bool,
) -> Any:
    """The result of a plan: what bands are missing is computed and written."""
    is_map = len(plan.shape) == 3
    if resume is not None and is_map and out is None:
        raise InputValueError("resume needs an out that holds the finished rows: an array or .npy")
    dtype = plan.values.dtype if isinstance(plan, Whole) else plan.geometry.dtype
    old = bool(finished.bands) and _is_there(out)
    if is_map and not old:
        finished.bands.clear()
    sink = open_sink(out, plan.shape, dtype, index, old)
    wanted = set(range(plan.bands)) - finished.bands.keys()
    failed: dict[FailedTile, None] = {}
    means = {i: _from_json(v) for i, v in finished.bands.items()} if not is_map else {}
    try:
        with tile_bar(progress, _tiles(plan, wanted)) as advance:
            for band in plan.run(wanted, advance):
                failed |= dict.fromkeys(band.failed)
                if is_map:
                    sink.write(band.values, slice(*band.rows))
                else:
                    means[band.number] = (band.weight, band.values)
                if not band.failed:
                    finished.add(band.number, True if is_map else _to_json(band))
        if not is_map:
            sink.write(_merged(plan, [means[i] for i in sorted(means)]))
    except BaseException:
        sink.abandon(keep=resume is not None)
        raise
    if failed and not keep:
        # A file that can be gone on with stays unfinished; else what there is gets its name.
        values = sink.result if resume is not None else sink.finish()
        raise TilingError(tuple(failed), plan.tiles, values)
    values = sink.finish()
    return TiledResult(values, tuple(failed)) if keep else values


def _is_there(out: Out) -> bool:
    return not isinstance(out, (str, os.PathLike)) or FileSink.exists(os.fspath(out))


def _tiles(plan: Plan | Whole, wanted: set[int]) -> int:
    return len(plan.needed(wanted)) * (plan.tiles // plan.bands)


def _merged(plan: Plan | Whole, means: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """The mean over the rows of tiles, in the output's dtype; NaN if there is none."""
    if isinstance(plan, Whole):
        return plan.values
    total = WeightedMean((plan.geometry.channels,), (), torch.float64)
    for weight, mean in means:
        if weight:
            total.add(mean, torch.tensor(weight, dtype=torch.float64, device="cpu"))
    return (total.mean if total.weight else total.mean * torch.nan).to(plan.geometry.dtype)


def _to_json(band: Band) -> list[Any]:
    return [band.weight, band.values.double().tolist()]


def _from_json(value: list[Any]) -> tuple[float, torch.Tensor]:
    return value[0], torch.tensor(value[1], dtype=torch.float64, device="cpu")


def _region(plan: Plan | Whole, band: Band) -> Region:
    low, high = band.rows
    source = plan.source
    top, bottom = 0, source.height
    if isinstance(plan, Plan):
        top = int(low / plan.rows.ratio)
        bottom = min(int(high / plan.rows.ratio), source.height)
    cells = (slice(low, high), slice(0, plan.shape[2]))
    return Region(cells, Box(top, 0, bottom, source.width), band.failed)


def _video(
    cut: _Cut,
    frames: Iterator[Any],
    predictor: Predictor,
    out: Out,
    progress: bool | Progress,
    keep: bool,
) -> Iterator[Any]:
    """The result of each frame; in its place of `out`, if that is an array."""
    for i, frame in enumerate(frames):
        plan = cut.plan(frame, predictor)
        try:
            index = () if out is None else (i,)
            yield _fill(plan, out, index, Finished(None, {}), None, progress, keep)
        except TilingError as error:
            failed = tuple(f._replace(frame=i) for f in error.failed)
            raise TilingError(failed, plan.tiles, error.values) from None
        finally:
            plan.source.close()


def _stacked(results: Iterator[TiledResult], count: int, out: Any, keep: bool) -> Any:
    """The results of all frames in one array: a new one for so many frames, or `out`."""
    failed: list[FailedTile] = []
    values, frame = out, -1
    for frame, result in enumerate(results):
        if out is None:
            if values is None:
                shape = (count, *result.values.shape)
                values = torch.empty(shape, dtype=result.values.dtype, device="cpu")
            values[frame] = result.values
        failed += [f._replace(frame=frame) for f in result.failed]
    if frame < 0:
        raise InputValueError("the video has no frames")
    if failed and not keep:
        raise TilingError(tuple(failed), None, values)
    return TiledResult(values, tuple(failed)) if keep else values
