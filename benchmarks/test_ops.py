"""Each op on shapes of real models: plain PyTorch, the vendor's kernel and vitfast side by side."""

from __future__ import annotations

import functools

import pytest
import torch

from vitfast.bench import ops
from vitfast.bench.modules import TRAIN_WORK
from vitfast.bench.ops import OpCase
from vitfast.bench.peers import PeerUnavailableError, Setting
from vitfast.errors import BackendUnavailableError
from vitfast.ops.spec import Cost, OpSpec, Sample
from vitfast.testing.inputs import materialise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CORE_FLOPS = 3e9
"""Of the core level: about 197 tokens of ViT-B."""


@functools.cache
def _is_core(spec: OpSpec, sample: Sample) -> bool:
    return spec.cost(*ops.as_passed(materialise(spec, sample, torch.float32))).flops <= CORE_FLOPS


def _cases() -> list:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for train in (False, True):
            for case in ops.real_cases(ops.specs(None), Setting(dtype, DEVICE, train)):
                core = dtype == torch.float32 and not train and _is_core(case.spec, case.sample)
                name = f"{case.spec.name}-{case.sample.name}-{case.setting.label}"
                marks = [] if core else [pytest.mark.full_only]
                found.append(pytest.param(case, id=name, marks=marks))
    return found


@pytest.mark.parametrize("provider", ["eager", "vendor", "vitfast"])
@pytest.mark.parametrize("case", _cases())
def test_op(timed, case: OpCase, provider: str) -> None:
    call = materialise(case.spec, case.sample, case.setting.dtype)
    call = call.map(lambda t: t.to(case.setting.device))
    try:
        contender = ops.contender(case, call, provider)
    except (PeerUnavailableError, BackendUnavailableError) as error:
        pytest.skip(str(error))
    cost = case.spec.cost(*ops.as_passed(call))
    if case.setting.train:
        cost = Cost(TRAIN_WORK * cost.flops, TRAIN_WORK * cost.bytes)
    group = f"{case.spec.name} {case.sample.name} {case.setting.label}"
    timed(group, contender, cost, case.setting, ops.Judge(case, call))
