"""One transformer block and whole models beside what a user would pick instead."""

from __future__ import annotations

import functools

import pytest
import torch

from vitfast.bench import modules, peers
from vitfast.bench.peers import PeerUnavailableError, Setting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CORE = ("vit_base_patch16_224", (224, 224))
MORE = (
    ("vit_base_patch16_224", (1024, 1024)),
    ("vit_small_patch14_dinov2", (518, 518)),
    ("vit_small_patch16_dinov3", (256, 256)),
    ("eva02_small_patch14_224", (224, 224)),
    ("beit_base_patch16_224", (224, 224)),
)
PROVIDERS = ("eager", "compile", "onnxruntime", "openvino", "vitfast")


def _cases() -> list:
    found = []
    for name, size in (CORE, *MORE):
        for dtype in (torch.float32, torch.bfloat16):
            for train in (False, True):
                setting = Setting(dtype, DEVICE, train)
                core = (name, size) == CORE and dtype == torch.float32 and not train
                found.append(
                    pytest.param(
                        (name, size, setting),
                        id=f"{name}@{size[0]}-{setting.label}",
                        marks=[] if core else [pytest.mark.full_only],
                    )
                )
    return found


@functools.lru_cache(maxsize=1)
def _made(level: str, name: str, size: tuple[int, int], setting: Setting) -> tuple:
    """A case with its float64 reference, kept while its providers take their turns."""
    make = modules.block_case if level == "blocks" else modules.model_case
    case = make(name, size, 1, setting)
    cost = case.cost()
    judged = cost.flops <= modules.REFERENCE_FLOPS[DEVICE]
    return case, cost, modules.Judge(case) if judged else None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", _cases())
@pytest.mark.parametrize("level", ["blocks", "models"])
def test_module(timed, request, level: str, case: tuple, provider: str) -> None:
    name, size, setting = case
    if (level, provider) == ("models", "compile") and request.config.getoption("--level") == "core":
        pytest.skip("compiling a whole model takes longer than the rest: --level full")
    made, cost, judge = _made(level, name, size, setting)
    try:
        call = peers.FACTORIES[provider](made.module, made.inputs, setting)
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    group = f"{level} {name}@{size[0]} {setting.label}"
    timed(group, call, cost, setting, judge)
