"""Where results go, and the file that remembers how far a run came."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitfast.errors import InputTypeError, InputValueError
from vitfast.runtime.files import whole_file

Out = Any
"""None, an array-like, the path of an .npy file, or a function (shape, NumPy dtype) -> array."""
Shape = tuple[int, ...]


class Sink:
    """An array that takes finished rows of the output.

    Args:
        array: NumPy's, a memory map, zarr's, a tensor, or any that takes values by slices.
        shape: of the output, which the array's has to be, less what `index` takes away.
        index: of the array's first axes: the frame.
    """

    def __init__(self, array: Any, shape: Shape, index: tuple[int, ...] = ()) -> None:
        found = tuple(getattr(array, "shape", ()))
        if found[len(index) :] != shape or any(i >= n for i, n in zip(index, found, strict=False)):
            at = f" for frame {index[0]}" if index else ""
            raise InputValueError(
                f"out has the shape {list(found)}{at}, the output is {list(shape)}"
            )
        self.result, self._index = array, index
        if isinstance(array, torch.Tensor):
            is_floating, flags = array.is_floating_point(), None
        else:
            is_floating = np.dtype(array.dtype).kind == "f"
            flags = getattr(array, "flags", None)
        if not is_floating:
            raise InputTypeError(f"out holds {array.dtype}, the output is floating")
        if not getattr(flags, "writeable", True):
            raise InputValueError("out is read-only")

    def write(self, values: torch.Tensor, rows: slice | None = None) -> None:
        """Put values in: all, or a map's rows [C, rows, w]. They have arrived when this returns,
        as far as the array has a `flush`."""
        place: Any = (*self._index, ..., *(() if rows is None else (rows, slice(None))))
        if isinstance(self.result, torch.Tensor):
            self.result[place] = values.to(self.result.device, self.result.dtype)
        else:
            dtype = np.dtype(self.result.dtype)
            wide = values.float() if values.dtype == torch.bfloat16 else values
            self.result[place] = wide.numpy().astype(dtype, copy=False)
            if callable(flush := getattr(self.result, "flush", None)):
                flush()

    def finish(self) -> Any:
        """The filled array."""
        return self.result

    def abandon(self, keep: bool) -> None:
        """The run ended early; `keep` says that it may go on later."""


class FileSink(Sink):
    """An .npy file that has its name only when it is complete; until then it is `<name>.part`."""

    def __init__(self, path: str, shape: Shape, dtype: torch.dtype, old: bool) -> None:
        if not path.endswith(".npy"):
            raise InputValueError(f"out={path!r}: of files only .npy is written; give an array")
        self._path, self._part = Path(path), Path(path + ".part")
        if not self._path.parent.is_dir():
            raise InputValueError(f"out={path!r}: there is no such folder")
        if old and not self._part.exists():
            os.replace(self._path, self._part)
        try:
            array = np.lib.format.open_memmap(
                str(self._part), "r+" if old else "w+", _numpy_dtype(dtype), shape=shape
            )
            super().__init__(array, shape)
        except (ValueError, OSError) as error:
            raise InputValueError(f"{self._part} cannot be written: {error}") from error

    def finish(self) -> Any:
        self.result.flush()
        os.replace(self._part, self._path)
        return self.result

    def abandon(self, keep: bool) -> None:
        if not keep:
            with contextlib.suppress(OSError):
                self._part.unlink()

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is something to go on with."""
        return os.path.exists(path) or os.path.exists(path + ".part")


def open_sink(out: Out, shape: Shape, dtype: torch.dtype, index: tuple[int, ...], old: bool) -> Any:
    """The sink of one image's output.

    Args:
        old: whether what a file holds is gone on with; other arrays are taken as they are.

    Raises:
        InputTypeError, InputValueError: out is nothing to write to, or of another shape.
    """
    if out is None:
        return Sink(torch.empty(shape, dtype=dtype, device="cpu"), shape)
    if isinstance(out, (str, os.PathLike)):
        return FileSink(os.fspath(out), shape, dtype, old)
    if not hasattr(out, "shape") and callable(out):
        make: Callable[[Shape, np.dtype], Any] = out
        return Sink(make(shape, _numpy_dtype(dtype)), shape)
    if not (hasattr(out, "shape") and hasattr(out, "__setitem__")):
        raise InputTypeError(f"out is an array, a path or a function, not {type(out).__name__}")
    return Sink(out, shape, index)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """NumPy's, which has no bfloat16: float32 holds that."""
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    return torch.empty(0, dtype=kept, device="cpu").numpy().dtype


class Finished:
    """The bands of a run that are finished, in a small JSON file if the run may be interrupted.

    The file is replaced as a whole after each band, so that it is never half-written, and names a
    band only after the band itself was written.

    Args:
        path: of the file, or None to remember nothing.
        about: what the run is: image, tiles, output, weights. A run goes on only where a file says
            the same of itself.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self.bands: dict[int, Any] = {}
        self._path = None if path is None else Path(path)
        self._about = json.loads(json.dumps(about))
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise InputValueError(f"resume={str(path)!r}: there is no such folder")
        if self._path.exists():
            self._load(self._path)

    def _load(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            about, bands = found["about"], {int(k): v for k, v in found["bands"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputValueError(f"resume={str(path)!r} is no state of a tiled run") from error
        names = self._about.keys() | about.keys()
        if other := sorted(n for n in names if about.get(n) != self._about.get(n)):
            raise InputValueError(
                f"resume={str(path)!r} is of another run: {', '.join(other)} differ; delete it to "
                "begin anew"
            )
        self.bands = bands

    def add(self, band: int, value: Any = True) -> None:
        """A band is finished; `value` is JSON that comes back in `bands`."""
        self.bands[band] = value
        if self._path is not None:
            with whole_file(self._path, on_disk=True) as temporary:
                temporary.write_text(json.dumps({"about": self._about, "bands": self.bands}))
