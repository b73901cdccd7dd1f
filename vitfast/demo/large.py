"""A photograph of 4K through one shot and through tiles: time, memory, and how far they differ."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vitfast.bench import child, zoo
from vitfast.bench.peers import Setting
from vitfast.bench.progress import Progress
from vitfast.bench.report import digits
from vitfast.demo.large_child import WAYS
from vitfast.demo.photo import Photograph, enlarged

MODEL = "convnext_tiny"
SIZE = (2160, 3840)
"""Height and width in pixels."""
TILE, OVERLAP = 512, 0.1
BUDGET = 12.0
"""Seconds of calls a way; the first one counts, so that a slower way runs once."""
NAMES = {"timm": "timm, one shot", "vitfast": "vitfast, one shot", "tiles": "vitfast, tiles"}


class Scale(NamedTuple):
    """How large the demo's photograph of many pixels is, and how it is cut."""

    model: str = MODEL
    size: tuple[int, int] = SIZE
    tile: int = TILE
    budget: float = BUDGET


@dataclass
class Way:
    """What one way took.

    Args:
        key: of `WAYS`.
        seconds: of each call, from uint8 pixels to features; empty if it failed.
        peak_mb: with weights, photograph and features; None where it is unknown.
        apart: |features - those of vitfast's one shot| over the latter, Euclidean, on the cells
            that both have; None for that shot itself, and where it cannot be compared.
        reason: why there is no time; `apart_reason` and `peak_reason` say it of their numbers.
    """

    key: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    apart: float | None = None
    reason: str = ""
    peak_reason: str = ""
    apart_reason: str = ""

    @property
    def name(self) -> str:
        return NAMES[self.key]

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Large:
    """What the ways of `WAYS` took, and pictures of what came out.

    Args:
        how: in words, what the photograph is and how it came to its size.
        pictures: way -> its features as colours, for those of vitfast.
    """

    scale: Scale
    how: str
    photo: Image.Image
    ways: list[Way]
    pictures: dict[str, Image.Image]

    def way(self, key: str) -> Way:
        return next(way for way in self.ways if way.key == key)

    def sentence(self) -> str:
        """What the numbers say, or which of them there are not."""
        timm, shot, tiles = (self.way(key) for key in WAYS)
        height, width = self.scale.size
        failed = [way for way in (shot, tiles) if not way.seconds]
        if failed:
            return "; ".join(f"{way.name}: {way.reason}" for way in failed) + "."
        text = (
            f"{self.scale.model} at {width} x {height} pixels: one shot in "
            f"{seconds_of(shot)}{_memory(shot)}, tiles of {self.scale.tile} x {self.scale.tile} "
            f"pixels in {seconds_of(tiles)}{_memory(tiles)}"
        )
        if tiles.apart is not None:
            text += f"; features of tiles lie {share(tiles.apart)} from those of one shot"
        if timm.seconds:
            text += f"; timm's one shot took {seconds_of(timm)}{_memory(timm)}"
            if timm.apart is not None:
                text += f" and lies {share(timm.apart)} away"
        return text + "."


def seconds_of(way: Way) -> str:
    """The median with its unit: "9.81 s"."""
    assert way.median is not None  # callers look first
    return f"{digits(way.median)} s"


def share(value: float) -> str:
    """Per cent of something, small ones with an exponent: "3.1 %", "1.2e-04 %"."""
    return f"{100 * value:.1f} %" if value >= 5e-4 else f"{100 * value:.1e} %"


def run(
    photo: Photograph, scale: Scale, setting: Setting, pretrained: bool, say: Progress
) -> Large:
    """Take the photograph through each way, one after another, each in a process of its own.

    Args:
        say: gets what is going on, and the share of the work that is done.

    Raises:
        InputValueError: timm has no such model.
    """
    zoo.check_name(scale.model)
    image, how = enlarged(photo, *scale.size)
    features: dict[str, np.ndarray] = {}
    weights: dict[str, str] = {}
    ways = [Way(key) for key in WAYS]
    with tempfile.TemporaryDirectory(prefix="vitfast-") as folder:
        pixels = Path(folder, "pixels.npy")
        np.save(pixels, np.asarray(image))
        for i, way in enumerate(ways):
            say(f"{way.name} of {scale.size[1]} x {scale.size[0]}", i / len(ways))
            out = Path(folder, f"{way.key}.npy")
            arguments = {
                "way": way.key, "model": scale.model, "pixels": str(pixels), "tile": scale.tile,
                "overlap": OVERLAP, "dtype": str(setting.dtype).removeprefix("torch."),
                "device": setting.device, "threads": torch.get_num_threads(),
                "pretrained": pretrained, "budget": scale.budget, "out": str(out),
            }  # fmt: skip
            try:
                answer = child.answer("vitfast.demo.large_child", arguments, timeout=600.0)
            except child.ChildError as error:
                way.reason = f"failed: {error}"
                way.peak_reason = way.apart_reason = "it failed"
                continue
            way.seconds, way.peak_mb = answer["seconds"], answer["peak_mb"]
            if way.peak_mb is None:
                way.peak_reason = child.UNTOLD
            weights[way.key], features[way.key] = answer["weights"], np.load(out)
        _compare(ways, features, weights)
        pictures = dict(_coloured(features))
    say("a large photograph", 1.0)
    return Large(scale, how, image, ways, pictures)


def _compare(ways: list[Way], features: dict[str, np.ndarray], weights: dict[str, str]) -> None:
    """Fill in how far features [C, h, w] lie from those of vitfast's one shot."""
    for way in ways:
        if way.key not in features:
            continue
        if way.key == "vitfast":
            way.apart_reason = "the others are compared with it"
        elif "vitfast" not in features:
            way.apart_reason = "vitfast's one shot failed"
        elif weights[way.key] != weights["vitfast"]:
            way.apart_reason = "its weights depend on the size of its input"
        else:
            # A tile pads the image where one shot drops a last row of less than a patch.
            a, b = features[way.key], features["vitfast"]
            rows, columns = (min(n, m) for n, m in zip(a.shape[1:], b.shape[1:], strict=True))
            a, b = a[:, :rows, :columns], b[:, :rows, :columns]
            way.apart = float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _coloured(features: dict[str, np.ndarray]) -> Iterator[tuple[str, Image.Image]]:
    """(way, picture) of vitfast's ways: the three directions in which the features of one shot
    vary most are red, green and blue, of both."""
    if not {"vitfast", "tiles"} <= features.keys():
        return
    shot = features["vitfast"].reshape(len(features["vitfast"]), -1)
    mean = shot.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(shot - mean))
    axes = vectors[:, np.argsort(values)[::-1][:3]].T
    low, high = np.percentile(axes @ (shot - mean), [2, 98], axis=1)
    for key in ("vitfast", "tiles"):
        rows, columns = features[key].shape[1:]
        projected = axes @ (features[key].reshape(len(mean), -1) - mean)
        scaled = (projected - low[:, None]) / np.maximum(high - low, 1e-12)[:, None]
        pixels = (255 * scaled.clip(0, 1)).round().astype(np.uint8).T.reshape(rows, columns, -1)
        yield key, Image.fromarray(pixels)


def _memory(way: Way) -> str:
    return "" if way.peak_mb is None else f" and {way.peak_mb:.0f} MB"
