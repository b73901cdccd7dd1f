"""Process-wide settings: the only place that reads environment variables.

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
========================  ===========  ==========================================================
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from vitfast.errors import InputValueError

ENVIRONMENT = {
    "backend": "VITFAST_BACKEND",
    "disable": "VITFAST_DISABLE",
    "cpu_isa": "VITFAST_CPU_ISA",
    "log": "VITFAST_LOG",
}
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}

logger = logging.getLogger("vitfast")
logger.addHandler(logging.NullHandler())


def _flag(name: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise InputValueError(f"{name}={value!r}: expected 0 or 1")


@dataclass
class Settings:
    """See the module's table. `source` tells where each effective value came from."""

    backend: str = "auto"
    disable: bool = False
    cpu_isa: str | None = None
    log: str | None = None
    source: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_environment(cls, environ: dict[str, str] | None = None) -> Settings:
        environ = dict(os.environ) if environ is None else environ
        settings = cls()
        for attribute, variable in ENVIRONMENT.items():
            settings.source[attribute] = "default"
            raw = environ.get(variable)
            if not raw:
                continue
            value: object = _flag(variable, raw) if attribute == "disable" else raw
            setattr(settings, attribute, value)
            settings.source[attribute] = variable
        return settings

    def __setattr__(self, name: str, value: object) -> None:
        if name == "cpu_isa" and value is not None and value not in ISA_LEVELS:
            raise InputValueError(f"cpu_isa={value!r}: expected one of {', '.join(ISA_LEVELS)}")
        if name == "log" and value is not None:
            level = logging.getLevelName(str(value).upper())
            if not isinstance(level, int):
                raise InputValueError(f"log={value!r}: expected a logging level such as 'info'")
            logger.setLevel(level)
            if not any(isinstance(h, logging.StreamHandler) for h in logger.handlers):
                logger.addHandler(logging.StreamHandler())
        object.__setattr__(self, name, value)
        if name != "source" and "source" in self.__dict__:
            self.source[name] = "python"


settings = Settings.from_environment()


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
