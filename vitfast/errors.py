"""The error types. Each is also the built-in error a caller would expect to catch. And how any
error is told in a line."""

from __future__ import annotations


class VitfastError(Exception):
    """Base of every error that vitfast raises on purpose."""


class InputValueError(VitfastError, ValueError):
    """A shape, size or value that no backend could ever accept."""


class InputTypeError(VitfastError, TypeError):
    """An argument of the wrong type or dtype."""


class UnsupportedInputError(VitfastError, NotImplementedError):
    """Meaningful input that vitfast does not implement."""


class DeviceError(VitfastError, RuntimeError):
    """Tensors on different devices."""


class BackendUnavailableError(VitfastError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message lists the reasons."""


class NotTwiceDifferentiableError(VitfastError, RuntimeError):
    """A gradient of a gradient was asked for."""


class SwapError(VitfastError, RuntimeError):
    """`swap(strict=True)` met a module it had to leave alone."""


def first_line(error: BaseException, last: bool = False) -> str:
    """The first (or last) line of a message that is not empty, cut to what a table can show."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if last else 0][:200]
