"""Cases for generic tests: every OpSpec x sample x dtype, picked with `@pytest.mark.cases(...)`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vitfast.ops
from vitfast.ops.spec import OpSpec, Sample
from vitfast.testing.cases import Case
from vitfast.testing.inputs import generator_of

# Above either, a case's float64 reference alone takes seconds on one core: it is marked slow.
FLOPS, BYTES = 1e9, 20e6


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "cases(tags=None, dtypes=None, most=None, real=True): the samples for `case`: "
        "those with one of these tags, in these dtypes, at most so many of each op; without the "
        "shapes of real models if not real",
    )


def is_slow(spec: OpSpec, sample: Sample) -> bool:
    if "large" in sample.tags:
        return True
    with FakeTensorMode(allow_non_fake_inputs=True):
        cost = spec.cost(*sample.make(torch.float32, generator_of("cost")))
    return cost.flops > FLOPS or cost.bytes > BYTES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        specs = vitfast.ops.specs()
        metafunc.parametrize("spec", specs, ids=[s.name for s in specs])
    if "case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    options = dict.fromkeys(("tags", "dtypes", "most")) | {"real": True}
    options |= marker.kwargs if marker else {}
    params = []
    for spec in vitfast.ops.specs():
        samples = [
            s
            for s in spec.samples
            if (options["tags"] is None or s.tags & set(options["tags"]))
            and (options["real"] or "real" not in s.tags)
        ]
        for sample in samples[: options["most"]]:
            marks = [pytest.mark.slow] if is_slow(spec, sample) else []
            marks += [pytest.mark.check] if "check" in sample.tags else []
            for dtype in options["dtypes"] or spec.dtypes:
                case = Case(spec, sample, dtype)
                params.append(pytest.param(case, id=str(case), marks=marks))
    # Module scope makes pytest run all tests of one case together, so that its references,
    # computed once, can be dropped before the next.
    metafunc.parametrize("case", params, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(request.param.spec, request.param.sample, request.param.dtype)
    yield case
    vars(case).clear()
