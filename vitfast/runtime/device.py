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
