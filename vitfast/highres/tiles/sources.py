"""Images that are read some rows at a time: arrays, tensors, Pillow's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vitfast.errors import InputTypeError, InputValueError

LAYOUTS = ("auto", "HWC", "CHW")
_CHANNELS = (1, 2, 3, 4)
"""What an axis may count for `layout="auto"` to take it for the channels."""
_DTYPES = "uint8, uint16 or floating"


class Source:
    """An image of [height, width] pixels and so many channels, read by rows.

    Subclasses set the attributes and define `_read`.
    """

    height: int
    width: int
    channels: int
    dtype: torch.dtype
    """Of what `rows` gives: uint8, uint16 or floating."""
    device: torch.device = torch.device("cpu")
    """Of what `rows` gives."""
    identity: str = ""
    """What tells this image from another of the same size, as far as can be known cheaply."""

    def _read(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as [channels, rows, width]; any strides."""
        raise NotImplementedError

    def select(self, wanted: int | None) -> None:
        """Have `rows` give as many channels as a model wants; None for no wish.

        Greyscale is repeated; an alpha channel is dropped, as Pillow's convert("RGB") does.

        Raises:
            InputValueError: that is not possible.
        """
        kept = self.channels - 1 if self.channels in (2, 4) else self.channels
        wish = wanted or (3 if self.channels in _CHANNELS else self.channels)
        if wish == self.channels:
            kept = wish
        if kept not in (1, wish):
            raise InputValueError(
                f"the image has {self.channels} channels (or layout= is wrong), the model "
                f"takes {wish}"
            )
        self._kept, self.channels = kept, wish
        self._held: tuple[int, torch.Tensor] | None = None

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom), as `_read` gives them, of the selected channels.

        The rows last given are held: of those that are asked for again, none is read twice.
        """
        first, held = self._held or (top, None)
        known = 0 if held is None else first + held.shape[1] - top
        if held is not None and first <= top and 0 < known <= bottom - top:
            stripe = torch.empty(
                (held.shape[0], bottom - top, self.width), dtype=held.dtype, device=held.device
            )
            stripe[:, :known] = held[:, top - first :]
            if known < bottom - top:
                stripe[:, known:] = self._read(top + known, bottom)[: self._kept]
        else:
            stripe = self._read(top, bottom)[: self._kept]
        self._held = (top, stripe)
        return stripe.expand(self.channels, -1, -1) if self._kept == 1 else stripe

    def close(self) -> None:
        """Let go of files."""


class ArraySource(Source):
    """NumPy's arrays, memory maps, zarr's and others that have a shape, a dtype and slices."""

    def __init__(self, array: Any, layout: str = "auto") -> None:
        shape = tuple(array.shape)
        if len(shape) == 2:
            layout, shape = "HW", (*shape, 1)
        elif len(shape) != 3:
            raise InputValueError(
                f"an image has axes [H, W], [H, W, C] or [C, H, W], this one {list(shape)}"
            )
        elif layout == "auto":
            is_planar = shape[0] in _CHANNELS and shape[2] not in _CHANNELS
            layout = "CHW" if is_planar else "HWC"
        self._array, self._layout = array, layout
        order = (1, 2, 0) if layout == "CHW" else (0, 1, 2)
        self.height, self.width, self.channels = (int(shape[i]) for i in order)
        self.dtype = _torch_dtype(np.dtype(array.dtype))
        _check_size(self)

    def _read(self, top: int, bottom: int) -> torch.Tensor:
        is_planar = self._layout == "CHW"
        part = self._array[:, top:bottom] if is_planar else self._array[top:bottom]
        return to_planes(np.asarray(part), is_planar)


class TensorSource(Source):
    """torch's tensors, on any device."""

    def __init__(self, tensor: torch.Tensor, layout: str = "auto") -> None:
        if tensor.ndim == 2:
            tensor = tensor[None]
        elif tensor.ndim != 3:
            raise InputValueError(
                f"an image has axes [C, H, W], [H, W] or [H, W, C], this one {list(tensor.shape)}"
            )
        elif layout == "HWC":
            tensor = tensor.permute(2, 0, 1)
        elif layout == "auto" and tensor.shape[0] not in _CHANNELS and tensor.shape[2] in _CHANNELS:
            raise InputValueError(
                f"a tensor is [C, H, W], this one is {list(tensor.shape)}: give layout='HWC'"
            )
        if tensor.dtype not in (torch.uint8, torch.uint16) and not tensor.is_floating_point():
            raise InputTypeError(f"pixels are {_DTYPES}, not {tensor.dtype}")
        self._tensor, self.dtype, self.device = tensor.detach(), tensor.dtype, tensor.device
        self.channels, self.height, self.width = tensor.shape
        _check_size(self)

    def _read(self, top: int, bottom: int) -> torch.Tensor:
        return self._tensor[:, top:bottom]


def frames_of(image: Any) -> Iterator[Any] | None:
    """The frames of a video: of an iterator, a list or tuple, an array or tensor of four axes;
    None of a single image."""
    if isinstance(image, (list, tuple)) or hasattr(image, "__next__"):
        return iter(image)
    if len(getattr(image, "shape", ())) == 4:
        return (image[i] for i in range(image.shape[0]))
    return None


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """[H, W] or [H, W, C] of Pillow's image, upright: uint8 RGB, except that 16-bit greyscale stays
    uint16 and floats stay floats.

    Raises:
        InputValueError: a greyscale image of integers that do not fit 16 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise InputValueError("a greyscale image of 32-bit integers has no known white: scale")
        return values.astype(np.uint16)
    return np.asarray(image if image.mode in ("F", "L", "RGB") else image.convert("RGB"))


def to_planes(values: np.ndarray, is_planar: bool = False) -> torch.Tensor:
    """[C, H, W] in the machine's byte order, on memory of its own, of [H, W], [H, W, C] or, if
    planar, [C, H, W]."""
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * 255
    # A copy: memory maps may be read-only, which torch warns of, and files may be closed.
    tensor = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    if tensor.ndim == 2:
        return tensor[None]
    return tensor if is_planar else tensor.permute(2, 0, 1)


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    if dtype.kind == "b":
        return torch.uint8
    dtype = dtype.newbyteorder("=")
    if dtype.kind != "f" and dtype not in (np.uint8, np.uint16) or dtype.itemsize > 8:
        raise InputTypeError(f"pixels are {_DTYPES}, not {dtype}")
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _check_size(source: Source) -> None:
    if not (source.height and source.width and source.channels):
        raise InputValueError(
            f"an image of {source.height} x {source.width} pixels and {source.channels} channels "
            "is empty"
        )
