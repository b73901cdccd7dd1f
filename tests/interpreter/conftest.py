"""Triton's interpreter needs TRITON_INTERPRET=1 before Triton is loaded: a process of its own.

`tests/gpu/test_interpreter.py` starts it; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreter
"""

from __future__ import annotations

import os
import zlib

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    @triton.jit
    def _count(y_ptr, n):
        total = 0.0
        for _ in range(tl.program_id(0), tl.cdiv(n, 1), tl.num_programs(0)):
            total += 1.0
        tl.store(y_ptr, total)

    def _in_order(self, a, b, acc, input_precision, max_num_imprecise_acc):
        """acc + a b of float32, term after term, each rounded once."""
        total = acc.data
        for k in range(a.data.shape[1]):
            # The product of two float32 is exact in float64.
            product = a.data[:, k, None].astype(np.float64) * b.data[None, k]
            total = (total + product).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)


@pytest.fixture
def chained_products(monkeypatch):
    """Float32 products summed as on a GPU, and so the same for a tile and its transpose."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _in_order)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="such as 2/3: the second third of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--shard").split("/"))
    mine = [i for i in items if zlib.crc32(i.nodeid.encode()) % parts == part - 1]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(mine)])
    items[:] = mine
    if INTERPRETING and not _runs_loops():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=UNFIT))


UNFIT = "this Triton's interpreter cannot run on this NumPy"
"""Triton 3.6's takes arrays of one element for numbers, which NumPy 2.4 refuses."""


def _runs_loops() -> bool:
    """Whether the interpreter can run a loop up to a number that it computed."""
    y = torch.zeros(1)
    try:
        _count[(1,)](y, 3)
    except triton.runtime.errors.InterpreterError:
        return False
    return y.item() == 3
