"""`trust.untrusted`: where the automatic choice has no kernels, and what is said of it."""

from __future__ import annotations

import types

import pytest
import torch

from vitfast.runtime import launches, native, triton, trust
from vitfast.runtime.launches import Arch
from vitfast.settings import settings


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A CPU with kernels, a GPU with Triton, and no table but those in tmp_path."""
    monkeypatch.setattr(native, "reasons", list)
    monkeypatch.setattr(triton, "available", list)
    monkeypatch.setattr(trust, "arch_of", lambda device: Arch("sm_90"))
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launches.reread_tables()
    yield
    launches.reread_tables()


def of(device: str, dtype: torch.dtype) -> types.SimpleNamespace:
    """What `untrusted` asks of a tensor on a device that need not be there."""
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_the_cpu(monkeypatch, dtype):
    assert trust.untrusted(("attention", "linear_act"), of("cpu", dtype)) == ""
    monkeypatch.setattr(native, "reasons", lambda: ["native extension not built: no compiler"])
    why = trust.untrusted(("attention", "linear_act"), of("cpu", dtype))
    assert why == "native extension not built: no compiler"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64], ids=str)
def test_dtypes_without_kernels(dtype):
    why = trust.untrusted(("layer_norm",), of("cpu", dtype))
    assert why == f"there are no kernels for {dtype} on the CPU"


def test_the_dtype_of_autocast_counts():
    x = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert trust.untrusted(("linear_act",), x) == ""
    with torch.autocast("cpu", torch.float16):
        assert "torch.float16 on the CPU" in trust.untrusted(("linear_act",), x)
    assert trust.untrusted(("linear_act",), x) == ""


def test_on_a_gpu_every_op_needs_a_record():
    x = of("cuda", torch.bfloat16)
    why = trust.untrusted(("layer_norm", "rms_norm"), x)
    assert why == "no record shows layer_norm, rms_norm to be right on sm_90"
    launches.write_table(Arch("sm_90"), verified=["layer_norm"])
    why = trust.untrusted(("layer_norm", "rms_norm"), x)
    assert why == "no record shows rms_norm to be right on sm_90"
    assert trust.untrusted(("layer_norm",), x) == ""
    assert "torch.float64 on GPUs" in trust.untrusted(("layer_norm",), of("cuda", torch.float64))
    launches.write_table(Arch("sm_90"), verified=["layer_norm", "rms_norm"])
    assert trust.untrusted(("layer_norm", "rms_norm"), x) == ""


def test_a_gpu_without_triton(monkeypatch):
    launches.write_table(Arch("sm_90"), verified=["layer_norm"])
    monkeypatch.setattr(triton, "available", lambda: ["triton is not installed"])
    why = trust.untrusted(("layer_norm",), of("cuda", torch.float16))
    assert why == "triton is not installed"


def test_other_devices():
    why = trust.untrusted(("layer_norm",), of("mps", torch.float32))
    assert why == "there are no kernels for mps"


@pytest.mark.parametrize("backend", ["reference", "triton", "vendor", "cpu"])
def test_what_is_asked_for_by_name_is_not_questioned(monkeypatch, backend):
    monkeypatch.setattr(settings, "backend", backend)
    assert trust.untrusted(("layer_norm",), of("cuda", torch.float16)) == ""


def test_a_layer_without_ops_has_nothing_to_distrust():
    assert trust.untrusted((), of("cuda", torch.float16)) == ""
