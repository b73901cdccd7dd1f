"""What is asked of a model for a tile, and what its answer says about the output's geometry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from vitfast.errors import InputTypeError, InputValueError, UnsupportedInputError, first_line
from vitfast.runtime.wrappers import unwrapped

Output = Callable[[Any, torch.Tensor], torch.Tensor]
"""(model, batch [B, C, H, W]) -> [B, C', h, w] or [B, C']."""
PerChannel = Sequence[float] | torch.Tensor | float | None
Transform = Callable[[torch.Tensor], torch.Tensor]

_LARGEST_DENOMINATOR = 8
"""Of a ratio that is no stride and no whole magnification: 3/4, say."""


class BadOutputError(UnsupportedInputError):
    """What the model gave can be no tile of an output."""


class RefusedTileError(InputValueError):
    """The model raised for a tile without content."""


def _whole(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def _features(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The last block's features [B, C, h, w], after the final norm where timm allows for it."""
    options = dict(indices=1, intermediates_only=True, output_fmt="NCHW")
    try:
        return model.forward_intermediates(batch, norm=True, **options)[-1]
    except AssertionError as error:
        if "norm" not in str(error):  # Hiera's features know no norm
            raise
        return model.forward_intermediates(batch, **options)[-1]


def _pooled(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What the classifier would see: [B, C]."""
    return model.forward_head(model.forward_features(batch), pre_logits=True)


PRESETS: dict[str, tuple[Output, tuple[str, ...], int]] = {
    "features": (_features, ("forward_intermediates",), 4),
    "pooled": (_pooled, ("forward_features", "forward_head"), 2),
    "logits": (_whole, (), 2),
}
"""Name -> (function, methods of the model that it calls, axes of what it gives)."""


def _ratio(cells: int, pixels: int) -> Fraction:
    """Cells per pixel: a simple fraction if that is exact, else 1 / the stride that a network which
    rounds the number of its cells up or down must have.

    Raises:
        BadOutputError: no stride gives so many, or several do.
    """
    exact = Fraction(cells, pixels)
    if 1 in (exact.numerator, exact.denominator) or exact.denominator <= _LARGEST_DENOMINATOR:
        return exact
    around = range(pixels // (cells + 1), pixels // max(cells - 1, 1) + 2)
    strides = [s for s in around if s > 0 and cells in (pixels // s, -(-pixels // s))]
    if len(strides) > 1:
        raise BadOutputError(
            f"{cells} cells for {pixels} pixels may be any stride from {strides[0]} to "
            f"{strides[-1]}: give stride=, or a tile that is a multiple of it"
        )
    if not strides:
        raise BadOutputError(
            f"the output's size is no fixed fraction of the tile's: {cells} cells for {pixels} "
            "pixels"
        )
    return Fraction(1, strides[0])


class Geometry(NamedTuple):
    """The output of a tile."""

    channels: int
    ratio: tuple[Fraction, Fraction] | None
    """Cells per pixel, down and across; None of a pooled output."""
    dtype: torch.dtype
    is_exact: bool = True
    """Whether the tile has exactly that many cells; if not, the ratio is a guess."""


def _values(values: PerChannel) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device="cpu").detach().flatten()


class Predictor:
    """A model, what is asked of it, and how pixels are made its input.

    Args:
        model: a module in evaluation mode, or any callable on a batch.
        output: None, a name in `PRESETS`, or a function (model, batch) -> tensor.
        mean, std: [C] of pixels scaled to [0, 1].
        transform: pixels as they are, [B, C, H, W] on the model's device, to the model's input.

    Raises:
        InputTypeError, InputValueError: a model or option that cannot be.
    """

    def __init__(
        self,
        model: Any,
        output: str | Output | None = None,
        mean: PerChannel = None,
        std: PerChannel = None,
        transform: Transform | None = None,
    ) -> None:
        if not callable(model):
            raise InputTypeError(f"model is called on batches; a {type(model).__name__} cannot be")
        if transform is not None and (mean is not None or std is not None):
            raise InputValueError("give mean and std, or a transform that applies them: not both")
        module = model if isinstance(model, nn.Module) else None
        if module is not None and module.training:
            raise InputValueError(
                "the model is in training mode, where dropout and batch statistics differ from "
                "tile to tile: call model.eval() first"
            )
        self.module = None if module is None else unwrapped(module)
        self.model = model
        self.axes: int | None = None
        self._ask: Output = _whole
        self._choose(output)
        self._explicit = mean is not None or std is not None
        cfg = getattr(self.module, "pretrained_cfg", None) or {}
        self._mean = _values(cfg.get("mean", 0.0) if mean is None else mean)
        self._std = _values(cfg.get("std", 1.0) if std is None else std)
        self._transform = transform
        tensors = [] if module is None else [*module.parameters(), *module.buffers()]
        floating = [t for t in tensors if t.is_floating_point()]
        self.dtype = floating[0].dtype if floating else torch.float32
        self._device = tensors[0].device if tensors else None
        self._measured: dict[tuple[int, int, int], Geometry] = {}

    def _choose(self, output: str | Output | None) -> None:
        if isinstance(output, str):
            if output not in PRESETS:
                raise InputValueError(f"output={output!r} is none of {', '.join(PRESETS)}")
            self._ask, methods, self.axes = PRESETS[output]
            if methods:
                self.model = self.module  # wrappers do not hand on such methods
            if missing := [m for m in methods if not hasattr(self.model, m)]:
                raise InputTypeError(
                    f"output={output!r} needs a timm model with {' and '.join(missing)}; for "
                    "another, give output=function(model, batch) -> [B, C, h, w] or [B, C]"
                )
        elif callable(output):
            self._ask = output
        elif output is not None:
            raise InputTypeError(f"output is a name or a function, not {type(output).__name__}")

    @property
    def channels(self) -> int | None:
        """Channels of the images that the model takes; None where no convolution tells."""
        modules = [] if self.module is None else self.module.modules()
        first = next((m for m in modules if isinstance(m, nn.Conv2d)), None)
        return None if first is None else first.in_channels

    @property
    def multiple(self) -> tuple[int, int]:
        """Pixels, down and across, of which the model's own attributes say it takes multiples."""
        found = [1, 1]
        info = getattr(self.module, "feature_info", None)
        if isinstance(info, list):  # timm's own: the stage of the coarsest map
            coarsest = max((int(i.get("reduction", 1)) for i in info), default=1)
            found = [coarsest, coarsest]
        patch = getattr(getattr(self.module, "patch_embed", None), "patch_size", None)
        if patch is not None:
            sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
            found = [math.lcm(f, int(s)) for f, s in zip(found, sides, strict=True)]
        return found[0], found[1]

    @property
    def normalisation(self) -> list[Any]:
        """What `prepare` does to pixels, in values that can be compared and stored."""
        transform = self._transform
        name = None if transform is None else getattr(transform, "__qualname__", repr(transform))
        return [self._explicit, self._mean.tolist(), self._std.tolist(), name]

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """The model's input: scaled, normalised, in its dtype, on its device."""
        if self._device is not None:
            pixels = pixels.to(self._device)
        if self._transform is not None:
            given = self._transform(pixels)
            if not isinstance(given, torch.Tensor) or given.shape[::2] != pixels.shape[::2]:
                raise InputValueError("transform must keep the number and the size of the tiles")
            return given
        if pixels.is_floating_point() and not self._explicit:
            return pixels.to(self.dtype)
        scale = {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype)
        x = pixels.to(torch.promote_types(self.dtype, torch.float32))
        if scale is not None:
            x = x / scale
        for name, values in (("mean", self._mean), ("std", self._std)):
            if values.numel() not in (1, x.shape[1]):
                if self._explicit:
                    raise InputValueError(
                        f"{name} has {values.numel()} values for images of {x.shape[1]} channels"
                    )
                values = values.mean()  # a model made for other channels than its weights' were
            values = values.to(x.device, x.dtype).view(-1, 1, 1)
            x = x - values if name == "mean" else x / values
        return x.to(self.dtype)

    def __call__(
        self, pixels: torch.Tensor, valid: Sequence[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        """The output of a batch, on the CPU.

        Args:
            pixels: [B, C, H, W] of an image's dtype, see `prepare`.
            valid: (rows, columns) of each that belong to the image. The rest becomes 0 when
                normalised, which is what timm's own padding and that of convolutions put there.
        """
        with torch.inference_mode():
            batch = self.prepare(pixels)
            if valid is not None and any(v != tuple(batch.shape[2:]) for v in valid):
                batch = batch.clone() if batch is pixels else batch
                for x, (rows, columns) in zip(batch, valid, strict=True):
                    x[:, rows:] = 0
                    x[..., columns:] = 0
            found = self._ask(self.model, batch)
            return self._checked(found, len(batch)).cpu()

    def _checked(self, found: Any, count: int) -> torch.Tensor:
        if not isinstance(found, torch.Tensor):
            raise BadOutputError(
                f"the output must be one tensor, not a {type(found).__name__}; choose one with "
                "output=function(model, batch)"
            )
        if found.ndim not in (2, 4) or len(found) != count or not found.is_floating_point():
            raise BadOutputError(
                f"an output of shape {list(found.shape)} and {found.dtype} is neither a map "
                "[B, C, h, w] nor a vector [B, C] of floats; output='features' makes maps of "
                "tokens, output=function(model, batch) anything else"
            )
        if self.axes not in (None, found.ndim):
            raise BadOutputError(
                f"{'a map [B, C, h, w]' if self.axes == 4 else 'a vector [B, C]'} was asked for, "
                f"the model gave {list(found.shape)}"
            )
        return found

    def measure(self, pixels: torch.Tensor) -> Geometry:
        """The geometry of the output, by one call on one tile [1, C, H, W] like those to come.

        Raises:
            BadOutputError: what the model gave is no output of tiles.
            RefusedTileError: the model raised.
        """
        key = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        if key not in self._measured:
            try:
                found = self(pixels)
            except (BadOutputError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise RefusedTileError(self._refusal(key[1:], error)) from error
            self._measured[key] = self._geometry(found, key[1:])
        return self._measured[key]

    def _geometry(self, found: torch.Tensor, tile: tuple[int, ...]) -> Geometry:
        if found.ndim == 2:
            return Geometry(found.shape[1], None, found.dtype)
        down, across = map(_ratio, found.shape[2:], tile)
        is_exact = (down * tile[0], across * tile[1]) == tuple(found.shape[2:])
        return Geometry(found.shape[1], (down, across), found.dtype, is_exact)

    def _refusal(self, tile: tuple[int, ...], error: Exception) -> str:
        message = (
            f"the model refused a tile of {tile[0]} x {tile[1]} pixels: "
            f"{type(error).__name__}: {first_line(error)}"
        )
        fixed = getattr(getattr(self.module, "patch_embed", None), "img_size", None)
        if fixed is not None and tuple(fixed) != tuple(tile):
            message += (
                f" (it was built for {fixed[0]} x {fixed[1]}: give tile={tuple(fixed)}, or create "
                "it with dynamic_img_size=True, for Swin img_size=tile)"
            )
        return message
