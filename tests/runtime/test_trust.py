"""`trust`: where the automatic choice has kernels, what is said of it, and what is left open."""

from __future__ import annotations

import types

import pytest
import torch

from vitfast.runtime import launches, native, triton, trust, verdicts
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.triton_backend import lazy
from vitfast.runtime.verdicts import FAILED, RIGHT, SLOW, WRONG, Question, Verdict
from vitfast.settings import Settings, settings

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


def machine(**changes: str) -> dict[str, str]:
    facts = {"arch": "sm_90", "triton": "3.8.0", "torch": "2.14", "vitfast": "0", "device": "H200",
             "driver": "580", "runtime": "13.0"}  # fmt: skip
    return facts | changes


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A CPU with kernels, a GPU with Triton, and no verdict but those in tmp_path."""
    monkeypatch.setattr(native, "reasons", list)
    monkeypatch.setattr(triton, "available", list)
    monkeypatch.setattr(trust, "_is_captured", lambda device: False)
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trust.forget()
    monkeypatch.setattr(verdicts, "machine_of", lambda device: machine())
    launches.reread_tables()
    yield
    monkeypatch.undo()
    launches.reread_tables()
    trust.forget()


def of(device: str, dtype: torch.dtype) -> types.SimpleNamespace:
    """What `untrusted` asks of a tensor on a device that need not be there."""
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype)


def known(*ops: str, state: str = RIGHT, dtype: str = "bfloat16", passes=verdicts.PASSES):
    return {Question(op, dtype, p): Verdict(state, "so it is") for op in ops for p in passes}


def read_anew() -> None:
    """As another process would."""
    trust._DECISIONS.clear()
    trust._ANSWERS.clear()
    trust._known.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_the_cpu(monkeypatch, dtype):
    assert trust.untrusted(("attention", "linear_act"), of("cpu", dtype)) == ""
    monkeypatch.setattr(native, "reasons", lambda: ["native extension not built: no compiler"])
    monkeypatch.setattr(triton, "interpreting", lambda: False)
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


def test_on_a_gpu_every_op_needs_a_verdict():
    x = of("cuda:0", BF16)
    why = trust.untrusted(("layer_norm", "rms_norm"), x)
    assert why.startswith("layer_norm, rms_norm: not tested on this machine yet")
    verdicts.keep(GPU, known("layer_norm"))
    assert trust.untrusted(("layer_norm",), x) != ""  # decided, for this process
    read_anew()
    assert trust.untrusted(("layer_norm",), x) == ""
    assert trust.untrusted(("layer_norm", "rms_norm"), x).startswith("rms_norm: not tested")
    assert "torch.float64 on GPUs" in trust.untrusted(("layer_norm",), of("cuda:0", torch.float64))
    assert "not tested" in trust.untrusted(("layer_norm",), of("cuda:0", torch.float16))


@pytest.mark.parametrize("state", [WRONG, FAILED, SLOW])
def test_only_what_is_right_is_used(state):
    verdicts.keep(GPU, known("layer_norm") | known("rms_norm", state=state))
    why = trust.untrusted(("layer_norm", "rms_norm"), of("cuda:0", BF16))
    assert why == f"rms_norm: {state} in a test: so it is"


def test_training_needs_the_backward_too():
    found = known("layer_norm", passes=("forward",))
    trust.adopt(GPU, found | known("layer_norm", state=WRONG, passes=("backward",)))
    x = of("cuda:0", BF16)
    assert trust.untrusted(("layer_norm",), x) == "layer_norm: wrong in a test: so it is"
    with torch.no_grad():
        assert trust.untrusted(("layer_norm",), x) == ""


@pytest.mark.parametrize("open_", ["traced", "captured"])
def test_what_is_met_while_tracing_or_capturing_is_left_open(monkeypatch, open_):
    question = Question("layer_norm", "bfloat16", "forward")
    with monkeypatch.context() as patch:
        if open_ == "captured":
            patch.setattr(trust, "_is_captured", lambda device: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert trust.untrusted(("layer_norm",), of("cuda:0", BF16))
    verdicts.keep(GPU, known("layer_norm"))
    trust._known.cache_clear()
    assert (question, GPU) not in trust._DECISIONS
    assert trust.untrusted(("layer_norm",), of("cuda:0", BF16)) == ""


@pytest.mark.parametrize("what", ["device", "driver", "runtime", "triton", "torch", "vitfast"])
def test_another_machine_or_version_has_no_verdict(monkeypatch, what):
    verdicts.keep(GPU, known("layer_norm"))
    assert known("layer_norm").keys() <= verdicts.known(GPU).keys()
    monkeypatch.setattr(verdicts, "machine_of", lambda device: machine(**{what: "another"}))
    assert verdicts.known(GPU) == {}


def test_edited_kernels_have_no_verdict(monkeypatch):
    verdicts.keep(GPU, known("layer_norm", "linear_act"))
    real = verdicts.kernels_of
    monkeypatch.setattr(
        verdicts, "kernels_of", lambda op: "edited" if op == "layer_norm" else real(op)
    )
    assert {q.op for q in verdicts.known(GPU)} == {"linear_act"}


def test_a_gpu_without_triton(monkeypatch):
    verdicts.keep(GPU, known("layer_norm", dtype="float16"))
    monkeypatch.setattr(triton, "available", lambda: ["triton is not installed"])
    why = trust.untrusted(("layer_norm",), of("cuda:0", torch.float16))
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


def test_the_setting(monkeypatch):
    verdicts.keep(GPU, known("layer_norm"))
    assert trust.untrusted(("layer_norm",), of("cuda:0", BF16)) == ""
    for value, why in (("never", "settings.trust is 'never'"), ("cached", ""), ("test", "")):
        monkeypatch.setattr(settings, "trust", value)
        assert trust.untrusted(("layer_norm",), of("cuda:0", BF16)).endswith(why)
    assert Settings.from_environment({"VITFAST_TRUST": "cached"}).trust == "cached"


# ---- a launch that fails -------------------------------------------------------------------------


class OutOfResources(Exception):
    """As Triton's, which lies in a module of this name."""

    __module__ = "triton.runtime.errors"


@pytest.fixture
def dispatcher(monkeypatch, tmp_path):
    """An op whose Triton kernels raise what `module.error` is, and a reference; on a "GPU"."""
    import sys

    # Another name each time: who was imported once stays.
    module = types.ModuleType(f"vitfast.ops.layer_norm.faulty_{tmp_path.name}")
    module.error = OutOfResources("shared memory, wanted 1, there is 0")
    module.calls = []

    def run(*args):
        module.calls.append(args)
        if module.error is not None:
            raise module.error
        return "triton"

    module.forward = module.backward = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backend = lazy(module.__name__, lambda *_: [])
    reference = Backend("reference", lambda *_: "reference", lambda *_: [], lambda *_: "gradient")
    trust.adopt(torch.device("cpu"), known("layer_norm", dtype="float32"))
    return Dispatcher("layer_norm", [backend, reference]), module


def test_a_failed_launch_is_taken_over(dispatcher, caplog):
    """At once and from then on, with one warning; the forward and the backward."""
    found, module = dispatcher
    x = torch.zeros(3)
    assert found.pick("auto", (x,)).name == "triton"
    assert found.pick("auto", (x,)).forward((x,)) == "reference"
    assert found.pick("auto", (x,)).name == "reference"
    assert found.pick_backward("auto", (x,))(x) == "gradient"
    assert len(module.calls) == 1
    assert caplog.text.count("could not be launched") == 1 and "OutOfResources" in caplog.text
    assert "a launch failed" in trust.doubt("layer_norm", x.device, x.dtype, train=False)
    assert "not tested" in trust.doubt("layer_norm", x.device, torch.float16, train=False)


def test_a_backward_that_cannot_be_launched(dispatcher):
    found, _ = dispatcher
    x = torch.zeros(3)
    assert found.pick_backward("auto", (x,))(x, (x,)) == "gradient"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
     torch.cuda.OutOfMemoryError("CUDA out of memory"), ValueError("the user's"),
     RuntimeError("Triton Error [CUDA]: misaligned address")],
    ids=lambda e: str(e)[-20:],
)  # fmt: skip
def test_other_errors_are_the_users(dispatcher, error):
    found, module = dispatcher
    module.error = error
    with pytest.raises(type(error)):
        found.pick("auto", (torch.zeros(3),)).forward((torch.zeros(3),))
    assert found.pick("auto", (torch.zeros(3),)).name == "triton"


@pytest.mark.parametrize(
    "text",
    ["Triton Error [CUDA]: invalid argument", "Triton Error [HIP]:  Code: 98, invalid device",
     "Triton Error [CUDA]: too many resources requested for launch", "PassManager::run failed"],
)  # fmt: skip
def test_what_a_driver_or_compiler_refuses_is_a_failed_launch(dispatcher, text):
    found, module = dispatcher
    module.error = RuntimeError(text)
    assert found.pick("auto", (torch.zeros(3),)).forward((torch.zeros(3),)) == "reference"


def test_who_names_a_backend_sees_its_failure(dispatcher):
    found, _ = dispatcher
    with pytest.raises(OutOfResources):
        found.pick("triton", (torch.zeros(3),)).forward((torch.zeros(3),))


def test_the_interpreter_is_a_device(monkeypatch):
    """Without the extension, where Triton interprets, its kernels are what there is."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(native, "reasons", lambda: ["off"])
    monkeypatch.setattr(triton, "interpreting", lambda: True)
    assert "not tested" in trust.untrusted(("layer_norm",), of("cpu", torch.float16))
    trust.adopt(cpu, known("layer_norm", dtype="float16"))
    assert trust.untrusted(("layer_norm",), of("cpu", torch.float16)) == ""
    assert "no kernels" in trust.untrusted(("layer_norm",), of("cpu", torch.bfloat16))
