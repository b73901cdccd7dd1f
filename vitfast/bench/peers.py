"""What a user would pick instead: timm eager, torch.compile, ONNX Runtime, OpenVINO; and vitfast.

A peer is a factory: (module, inputs, setting) -> call without arguments. One that cannot serve a
setting raises `PeerUnavailableError` with a sentence; packages are imported when asked for.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitfast.errors import InputValueError, VitfastError, first_line

Call = Callable[[], Any]
"""Runs a contender once and gives its output, or output and gradients."""
CHECKED_GRADIENTS = 8
"""Parameters of a training case, about so many, whose gradients are compared."""
NOT_SWAPPED = "not swapped"
"""Why a model has no time of vitfast: what would be timed is timm."""


class PeerUnavailableError(VitfastError, RuntimeError):
    """A peer cannot run this case here; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """How a case runs: in float32 plainly, in bfloat16 and float16 under autocast.

    Args:
        device: "cpu" or "cuda".
        train: forward and backward in training mode, instead of a forward in eval mode.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    train: bool = False

    @property
    def label(self) -> str:
        """As in "bfloat16 train"."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {'train' if self.train else 'infer'}"

    def autocast(self) -> torch.autocast:
        """The context in which the case runs."""
        return torch.autocast(
            self.device.split(":")[0], dtype=self.dtype, enabled=self.dtype != torch.float32
        )


def eager(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """PyTorch's eager mode: the module as it is."""
    make = _train_call if setting.train else _infer_call
    return make(module, inputs, setting)


def vitfast(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """A swapped copy that shares the module's weights."""
    from vitfast.swap import swap

    fast = sharing_copy(module)
    if not swap(fast).swapped:
        raise PeerUnavailableError(NOT_SWAPPED)
    return eager(fast, inputs, setting)


def compiled(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """torch.compile with its defaults; compiles before it returns."""
    torch._dynamo.reset()
    faster: Any = torch.compile(sharing_copy(module), dynamic=False)
    call = eager(faster, inputs, setting)
    try:
        call()
    except Exception as error:  # inductor raises whatever its compiler raised
        raise PeerUnavailableError(f"torch.compile failed: {first_line(error)}") from error
    return call


def onnxruntime(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """ONNX Runtime on its CPU provider, exported by torch.onnx, float32."""
    _refuse(setting, dtypes=(torch.float32,), peer="ONNX Runtime's CPU provider")
    _require("onnxruntime", "onnx", "onnxscript")
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Or its threads would still be waiting for work, busily, while the next contender is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory(prefix="vitfast-") as folder:
        path = os.path.join(folder, "model.onnx")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(module, tuple(inputs), path, dynamo=True, verbose=False)
        except Exception as error:  # the exporter wraps what tracing raised
            raise PeerUnavailableError(f"torch.onnx.export failed: {first_line(error)}") from error
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """OpenVINO's CPU plugin, converted from the traced module; bf16 by its precision hint."""
    _refuse(setting, dtypes=(torch.float32, torch.bfloat16), peer="OpenVINO's CPU plugin")
    _require("openvino")
    import openvino as ov

    core = ov.Core()
    precision = "bf16" if setting.dtype == torch.bfloat16 else "f32"
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise PeerUnavailableError("OpenVINO has no bfloat16 on this CPU")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tracer announces every Python branch
        converted = ov.convert_model(module, example_input=tuple(inputs))
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(converted, "CPU", config).create_infer_request()
    for index, x in enumerate(inputs):
        request.set_input_tensor(index, ov.Tensor(x.numpy(), shared_memory=True))

    def call() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


FACTORIES: dict[str, Callable[[nn.Module, Sequence[torch.Tensor], Setting], Call]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "vitfast": vitfast,
}
"""Contender -> (module, inputs, setting) -> its call."""
PEERS = tuple(name for name in FACTORIES if name != "vitfast")


def parse(names: str, known: Iterable[str] = PEERS) -> list[str]:
    """The names in "eager,compile", each once and in that order.

    Raises:
        InputValueError: an unknown name.
    """
    known = tuple(known)
    wanted = list(dict.fromkeys(n.strip() for n in names.split(",") if n.strip()))
    for name in wanted:
        if name not in known:
            raise InputValueError(f"no peer {name!r}; there is {', '.join(known)}")
    return wanted


def versions() -> dict[str, str | None]:
    """Installed versions of the optional peers; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in ("onnxruntime", "openvino"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def sharing_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are those of the module: no second set in memory."""
    shared = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(t): t for t in shared})


def _infer_call(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """Forward in inference mode."""

    def call() -> torch.Tensor:
        with torch.inference_mode(), setting.autocast():
            return module(*inputs)

    return call


def _train_call(module: nn.Module, inputs: Sequence[torch.Tensor], setting: Setting) -> Call:
    """Forward and backward of a fixed projection of the output; gives output and gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    step = max(1, len(parameters) // CHECKED_GRADIENTS)
    seeds: dict[torch.Size, torch.Tensor] = {}

    def call() -> list[torch.Tensor]:
        module.zero_grad(set_to_none=True)
        with setting.autocast():
            output = module(*inputs)
        if output.shape not in seeds:
            generator = torch.Generator().manual_seed(0)
            seeds[output.shape] = torch.randn(output.shape, generator=generator).to(output.device)
        output.backward(seeds[output.shape].to(output.dtype))
        return [output.detach(), *(p.grad for p in parameters[::step] if p.grad is not None)]

    return call


def _refuse(setting: Setting, dtypes: tuple[torch.dtype, ...], peer: str) -> None:
    """Raises PeerUnavailableError but for inference on the CPU in one of these dtypes."""
    if setting.train:
        raise PeerUnavailableError("inference only")
    if setting.device != "cpu":
        raise PeerUnavailableError("measured on the CPU only")
    if setting.dtype not in dtypes:
        raise PeerUnavailableError(f"no {str(setting.dtype).removeprefix('torch.')} in {peer}")


def _require(*packages: str) -> None:
    """Raises PeerUnavailableError where a package is not installed."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise PeerUnavailableError(
            f"{', '.join(missing)} not installed (pip install 'vitfast[bench]')"
        )
