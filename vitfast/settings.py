"""Process-wide settings, and the user's folder: the only reader of environment variables.

Every setting has an environment variable, read once at import, and an attribute that wins over it:

    import vitfast
    vitfast.settings.backend = "reference"

========================  ===========  ==========================================================
variable                  attribute    meaning
========================  ===========  ==========================================================
``VITFAST_BACKEND``       backend      backend for every op ("cpu", "vendor", "reference", ...);
                                       one that cannot run raises. Default "auto"
``VITFAST_DISABLE``       disable      "1": swapped layers run timm's own forward, ops their
                                       reference
``VITFAST_CPU_ISA``       cpu_isa      highest instruction set for native CPU kernels: "baseline",
                                       "avx2", "avx512", "avx512_bf16"; can only lower it
``VITFAST_LOG``           log          level of the "vitfast" logger ("info", "debug", ...)
``VITFAST_WEIGHTS``       weights      how inference on the CPU notices that weights it keeps in
                                       another order were edited past PyTorch (through .data, NumPy,
                                       another process): "watch" reads all of them once in 32 calls,
                                       "verify" all of them in every call, "frozen" looks at no
                                       weight again until `vitfast.refresh`. Default "watch"
``VITFAST_MEMORY``        memory       "speed" keeps weights in the order in which products read
                                       them and the memory of large results for the next; "low"
                                       orders weights anew in each call and keeps neither.
                                       Default "speed"
``VITFAST_TRUST``         trust        which GPU kernels the automatic choice may take: those that a
                                       record, this user's cache or a self-test in a process of its
                                       own ("test") showed to be right, a record or the cache
                                       ("cached"), none ("never"). Default "test"
========================  ===========  ==========================================================
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from vitfast.errors import InputValueError

ENVIRONMENT = {
    "backend": "VITFAST_BACKEND",
    "disable": "VITFAST_DISABLE",
    "cpu_isa": "VITFAST_CPU_ISA",
    "log": "VITFAST_LOG",
    "weights": "VITFAST_WEIGHTS",
    "memory": "VITFAST_MEMORY",
    "trust": "VITFAST_TRUST",
}
BACKENDS = ("auto", "cpu", "triton", "cuda", "vendor", "reference")
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
WEIGHTS = ("watch", "verify", "frozen")
MEMORY = ("speed", "low")
TRUST = ("never", "cached", "test")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}

logger = logging.getLogger("vitfast")
logger.addHandler(logging.NullHandler())


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes what no other handler would: an application that configures logging sees a line once.

    The application may configure logging before or after `settings.log` is set, so that the
    handlers on the way up are looked at for every record, and so is `sys.stderr`.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> Any:
        where: logging.Logger | None = logging.getLogger(record.name)
        while where is not None:
            for handler in where.handlers:
                silent = handler is self or isinstance(handler, logging.NullHandler)
                if not silent and record.levelno >= handler.level:
                    return False
            where = where.parent if where.propagate else None
        return super().filter(record)


_handler = _StderrHandler()


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if not isinstance(value, (str, int)) or word not in _TRUE | _FALSE:
        raise ValueError("True, False, 1, 0, yes, no, on, off")
    return word in _TRUE


def _one_of(choices: tuple[str, ...], value: object) -> object:
    if value not in choices:
        raise ValueError(", ".join(choices))
    return value


def _level(value: object) -> object:
    if not isinstance(value, str) or not isinstance(logging.getLevelName(value.upper()), int):
        raise ValueError(", ".join(_LEVELS))
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "backend": lambda value: _one_of(BACKENDS, value),
    "disable": _flag,
    "cpu_isa": lambda value: None if value is None else _one_of(ISA_LEVELS, value),
    "log": lambda value: None if value is None else _level(value),
    "weights": lambda value: _one_of(WEIGHTS, value),
    "memory": lambda value: _one_of(MEMORY, value),
    "trust": lambda value: _one_of(TRUST, value),
}
"""Attribute -> the value that is kept; a ValueError lists the values that are allowed."""


@dataclass
class Settings:
    """See the module's table. `source` tells where each effective value came from."""

    backend: str = "auto"
    disable: bool = False
    cpu_isa: str | None = None
    log: str | None = None
    weights: str = "watch"
    memory: str = "speed"
    trust: str = "test"
    source: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_environment(cls, environ: dict[str, str] | None = None) -> Settings:
        environ = dict(os.environ) if environ is None else environ
        settings = cls()
        for attribute, variable in ENVIRONMENT.items():
            settings.source[attribute] = "default"
            raw = environ.get(variable)
            if raw:
                value = _checked(attribute, raw, f"environment variable {variable}")
                setattr(settings, attribute, value)
                settings.source[attribute] = variable
        return settings

    def __setattr__(self, name: str, value: object) -> None:
        if name == "source":
            object.__setattr__(self, name, value)
            return
        if name not in _CHECKS:
            raise _unknown(name)
        value = _checked(name, value, f"vitfast.settings.{name}")
        if name == "log":
            _log(None if value is None else str(value).upper())
        object.__setattr__(self, name, value)
        if "source" in self.__dict__:
            self.source[name] = "python"

    def __getattr__(self, name: str) -> Any:
        """Called for names that there are none of."""
        raise _unknown(name)


def _checked(name: str, value: object, label: str) -> Any:
    try:
        return _CHECKS[name](value)
    except ValueError as allowed:
        raise InputValueError(f"{label}={value!r}: expected one of {allowed}") from None


def _unknown(name: str) -> AttributeError:
    near = difflib.get_close_matches(name, _CHECKS, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_CHECKS)}"
    return AttributeError(f"vitfast.settings has no setting {name!r}; {hint}")


def _log(level: str | None) -> None:
    """Let the logger speak from this level on; None leaves it to the application, as at first."""
    if level is not None:
        logger.setLevel(level)
        logger.addHandler(_handler)  # which does nothing the second time
    elif _handler in logger.handlers:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(_handler)


settings = Settings.from_environment()


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process with some variables changed, for a process that it starts."""
    return {**os.environ, **changes}


def torchrun() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) as torchrun tells its processes; (0, 1, 0) outside.

    Raises:
        InputValueError: the variables are set to what torchrun would not set them to.
    """
    names, alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("0", "1", "0")
    if "RANK" not in os.environ:
        return 0, 1, 0
    given = [os.environ.get(name, usual) for name, usual in zip(names, alone, strict=True)]
    if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
        text = ", ".join(map("=".join, zip(names, given, strict=True)))
        raise InputValueError(f"{text} in the environment: torchrun sets no such values")
    rank, world, local = map(int, given)
    return rank, world, local


def cache_folder() -> Path:
    """Where this user's measurements are kept; it may not exist yet.

    `$XDG_CACHE_HOME/vitfast` where that is set, else where the system keeps caches.
    """
    home = Path(os.path.expanduser("~"))
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification has others ignored
        return Path(given, "vitfast")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local", "vitfast")
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "vitfast"


class _SettingsModule(ModuleType):
    """`vitfast.settings` is this file as well as the object; both ways of reading and setting work.

    The import system binds the file on the package whenever anything imports it.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(settings, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("__") or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(settings, name, value)

    def __repr__(self) -> str:
        return repr(settings)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *ENVIRONMENT, "source"})


sys.modules[__name__].__class__ = _SettingsModule
