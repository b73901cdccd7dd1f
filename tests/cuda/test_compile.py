"""Kernels of csrc/cuda compile with NVRTC for the oldest and the newest GPUs; no GPU is needed."""

import pytest
import torch

from vitfast.errors import BackendUnavailableError
from vitfast.runtime import cuda


@pytest.fixture(autouse=True)
def nvrtc():
    bindings = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings brings NVRTC")
    try:
        bindings.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a", "sm_120"])
@pytest.mark.parametrize("dtype", cuda.TYPES, ids=str)
def test_kernels_of_one_dtype_and_size(architecture, dtype):
    cubin = cuda.compiled("dwconv", cuda.defines_of(dtype, SIZE=3), architecture)
    assert cubin.startswith(b"\x7fELF")
    for kernel in ("wide", "narrow", "taps"):
        assert f".text.dwconv_{kernel}_{cuda.NAMES[dtype]}_3\0".encode() in cubin
    assert b"_5\0" not in cubin


@pytest.mark.parametrize("size", [7, 11])
def test_large_kernels(size):
    cubin = cuda.compiled("dwconv", cuda.defines_of(torch.float16, SIZE=size), "sm_80")
    assert f".text.dwconv_wide_f16_{size}\0".encode() in cubin
    assert (f"narrow_f16_{size}\0".encode() in cubin) == (size <= 7)


def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(cuda, "compiled", lambda *given: calls.append(given) or b"cubin")
    given = ("dwconv", cuda.defines_of(torch.float16, SIZE=3), "sm_80")
    assert cuda.cubin(*given) == cuda.cubin(*given) == b"cubin"
    assert calls == [given]
    text = cuda.text
    monkeypatch.setattr(cuda, "text", lambda name: text(name) + "// edited")
    cuda.cubin(*given)
    assert len(calls) == 2
    assert len(list((tmp_path / "vitfast" / "cuda").iterdir())) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "vitfast").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "compiled", lambda *given: b"cubin")
    assert cuda.cubin("dwconv", (), "sm_80") == b"cubin"


def test_the_compilers_words_are_passed_on(monkeypatch):
    monkeypatch.setattr(cuda, "text", lambda name: "no C at all")
    with pytest.raises(BackendUnavailableError, match=r"(?s)does not compile for sm_80.*error"):
        cuda.compiled("dwconv", (), "sm_80")
