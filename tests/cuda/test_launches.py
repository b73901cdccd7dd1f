"""What reaches CUDA's driver, by a driver that launches nothing."""

import contextlib
import ctypes
import enum
import struct
from types import SimpleNamespace

import pytest
import torch

from vitfast.errors import BackendUnavailableError
from vitfast.runtime import cuda
from vitfast.runtime.cuda import Launch

driver = pytest.importorskip("cuda.bindings.driver")


class Result(enum.IntEnum):
    SUCCESS = 0
    ERROR_OUT_OF_RESOURCES = 701


@pytest.fixture
def calls(monkeypatch):
    made = []

    def launch(function, *rest):
        *grid, shared, stream, pointers, extra = rest
        address = ctypes.c_void_p.from_address(pointers).value
        made.append((function, tuple(grid), shared, stream, ctypes.string_at(address, 24), extra))
        return (Result(calls_fail[0]),)

    calls_fail = [0]
    monkeypatch.setattr(driver, "cuLaunchKernel", launch)
    monkeypatch.setattr(driver, "cuModuleLoadData", lambda image: (Result(0), image.decode()))
    monkeypatch.setattr(
        driver, "cuModuleGetFunction", lambda module, name: (Result(0), f"{module}:{name.decode()}")
    )
    monkeypatch.setattr(cuda, "cubin", lambda *given: " ".join(map(str, given)).encode())
    monkeypatch.setattr(cuda, "capability", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=1000 + index)
    )
    for cached in (cuda._module, cuda._function):
        cached.cache_clear()
    yield made, calls_fail
    for cached in (cuda._module, cuda._function):
        cached.cache_clear()


def test_a_launch(calls):
    made, _ = calls
    x = torch.zeros(8)
    given = Launch("dwconv", "kernel", ("A=1",), 70000, 96, 4096, "PPi", (x, None, -3))
    cuda.launch(given, torch.device("cuda", 2))
    expected = struct.pack("@PPi4x", x.data_ptr(), 0, -3)
    function = "dwconv ('A=1',) sm_90a:kernel"
    assert made == [(function, (70000, 1, 1, 96, 1, 1), 4096, 1002, expected, 0)]


def test_an_error_of_the_driver(calls):
    made, fail = calls
    fail[0] = 701
    given = Launch("dwconv", "kernel", (), 1, 32, 0, "PPi", (None, None, 1))
    with pytest.raises(BackendUnavailableError, match=r"ERROR_OUT_OF_RESOURCES \(error 701\)"):
        cuda.launch(given, torch.device("cuda", 0))
