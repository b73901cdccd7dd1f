"""Triton's interpreter needs TRITON_INTERPRET=1 before Triton is loaded: a process of its own.

`tests/gpu/test_interpreter.py` starts it; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreter
"""

from __future__ import annotations

import os
import zlib

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="such as 2/3: the second third of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--shard").split("/"))
    mine = [i for i in items if zlib.crc32(i.nodeid.encode()) % parts == part - 1]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(mine)])
    items[:] = mine
