"""Facts about this machine, for `vitfast info` and for records of measurements."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path

import torch


@functools.cache
def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_signature() -> str | None:
    """ "family 25, model 1, stepping 1", as the processor tells programs; None where Linux is not.

    Its name alone is often that of a virtual machine's maker, "AMD EPYC" say.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values: dict[str, str] = {}
    for line in lines:
        name, colon, value = (part.strip() for part in line.partition(":"))
        if colon:
            values.setdefault(name, value)  # the first core's
    names = {"cpu family": "family", "model": "model", "stepping": "stepping"}
    found = [f"{short} {values[name]}" for name, short in names.items() if name in values]
    return ", ".join(found) or None


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter; None where missing."""
    names = ("vitfast", "torch", "torchvision", "timm", "triton", "xformers", "numpy")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def machine() -> dict[str, object]:
    """What a record of a measurement needs. Never initialises CUDA in a process without a GPU."""
    facts: dict[str, object] = {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        facts["gpus"] = [
            torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())
        ]
    return facts
