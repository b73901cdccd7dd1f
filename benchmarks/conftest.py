"""What the suites share: the level of detail, timing by pytest-benchmark, and its extra columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vitfast.bench import machine, timer
from vitfast.bench.peers import Setting
from vitfast.ops.spec import Cost

LEVELS = ("core", "full")
SECONDS = {"core": 0.15, "full": 2.0}
"""Timed work of one benchmark."""
ROUNDS = (3, 200)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--level",
        choices=LEVELS,
        default="core",
        help="core: 224 px, inference, float32, under two minutes; full: every real shape, "
        "float32 and bfloat16, inference and training",
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["vitfast"] = machine.describe()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--level") == "core":
        kept = [item for item in items if item.get_closest_marker("full_only") is None]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_only: runs at --level full only")


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time a call and put beside the times what they come to."""
    seconds = SECONDS[request.config.getoption("--level")]

    def run(
        group: str,
        call: Callable[[], Any],
        cost: Cost,
        setting: Setting,
        judge: Callable[[str, Any], float] | None,
    ) -> None:
        watch = timer.stopwatch(setting.device)
        once, output = watch(call, 1)
        errors = [] if judge is None else [judge(group, output)]
        once, _ = watch(call, 1)
        iterations = max(1, math.ceil(2e-4 / max(once, 1e-7)))
        rounds = int(seconds / max(once * iterations, 1e-7))
        rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
        benchmark.group = group
        output = benchmark.pedantic(
            lambda: _finished(call, setting), rounds=rounds, iterations=iterations
        )
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "gflops": cost.flops / median / 1e9,
            "gbs": cost.bytes / median / 1e9,
            "share_of_floor": machine.floor_seconds(cost, setting.device, setting.dtype) / median,
        }
        if judge is not None:
            errors.append(judge(group, output))
            benchmark.extra_info["error_over_budget"] = max(errors)

    return run


def _finished(call: Callable[[], Any], setting: Setting) -> Any:
    output = call()
    if setting.device != "cpu":
        torch.cuda.synchronize()
    return output
