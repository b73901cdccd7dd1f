"""Launches of Triton kernels as they would be made on a GPU that is not here: recorded, not run.

An op's real sample runs through its public function and its Triton backend on CPU tensors, while
every launch is only written down. So grids, run-time numbers, constants and Triton's own
specialisation (which arguments divide by 16, which are 1) are those of the real call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vitfast.ops
from vitfast.runtime import kernel_calls, launches
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.runtime.launches import Arch, Launch
from vitfast.runtime.triton import NAMES
from vitfast.testing.inputs import OpCall, generator_of

if TYPE_CHECKING:
    from vitfast.ops.spec import Cost, OpSpec, Sample

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg")
_SHARED = (
    "weight", "bias", "gamma", "prefix", "pos", "table", "padding", "scale", "rope", "mean", "std",
)  # fmt: skip
"""Parts of the names of arguments that all images of a batch share."""

_CONSTANT = ("rope", "mask", "mean", "std")
"""Arguments that no model learns."""


@dataclass(frozen=True)
class Recorded:
    """One launch of a kernel.

    Args:
        kernel: the `triton.jit` function.
        grid: programs along x, y and z.
        arguments: by name, in the kernel's order; a tensor argument is an `Array`.
        options: num_warps and the like.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Array:
    """A tensor that a kernel was given.

    Args:
        memory: what tells two tensors in one storage from two in two.
        offset, nbytes: of the part of that storage that its elements lie in.
    """

    dtype: torch.dtype
    memory: int
    offset: int
    nbytes: int


def modules() -> dict[str, Any]:
    """Triton modules by op."""
    found = {}
    for op in vitfast.ops.NAMES:
        name = f"vitfast.ops.{op}.triton"
        if importlib.util.find_spec(name) is not None:
            found[op] = importlib.import_module(name)
    return found


def array_of(t: torch.Tensor) -> Array:
    """What a launch knows of a tensor; one that is expanded counts each element once."""
    memory, size = t.untyped_storage().data_ptr(), t.element_size()
    elements = math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
    return Array(t.dtype, memory, int(t.storage_offset()) * size, int(elements) * size)


class _Unfilled(TorchDispatchMode):
    """Within, PyTorch's own ops give tensors of the right shapes that nothing was computed for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if func.namespace != "aten":
            return func(*args, **kwargs)  # an op of ours; `pick` brings the mode back within
        if func._schema.is_mutable and func._opname not in ("set_", "resize_"):
            return kwargs.get("out", args[0])
        aliases = any(r.alias_info for r in func._schema.returns)
        if not given or aliases:
            return func(*args, **kwargs)
        if all(str(r.type) in ("Scalar", "bool", "number") for r in func._schema.returns):
            return 0  # what is read of a tensor: the same each time
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return tree_map_only(torch.Tensor, _on_cpu, func(*args, **kwargs))


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _on_cpu(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


def record(function: Callable[[], Any], arch: Arch) -> list[Recorded]:
    """The launches that `function` makes on CPU tensors, as on a GPU of this architecture."""
    found: list[Recorded] = []
    with _only_recording(found, arch):
        function()
    return found


@contextlib.contextmanager
def _only_recording(found: list[Recorded], arch: Arch) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {n: kwargs.pop(n) for n in _OPTIONS if n in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        sizes = grid(dict(bound.arguments)) if callable(grid) else tuple(grid)
        arguments = {
            n: array_of(a) if isinstance(a, torch.Tensor) else getattr(a, "value", a)
            if type(a).__name__ == "constexpr" else a
            for n, a in bound.arguments.items()
        }  # fmt: skip
        found.append(Recorded(self, (*sizes, 1, 1)[:3], arguments, options))

    def pick(self: Dispatcher, name: str, *args: Any, needs_backward: bool = False) -> Backend:
        backend = self.backends.get("triton") or real(self, name, *args)

        def unfilled(function: Any) -> Any:
            def call(*args: Any) -> Any:
                with _Unfilled():
                    return function(*args)

            return function and call

        functions = unfilled(backend.forward), unfilled(backend.backward)
        return replace(backend, forward=functions[0], backward=functions[1])

    real = Dispatcher.pick
    modules()  # those that are imported at their first call would not be patched
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(Dispatcher, "pick", pick))
        stack.enter_context(mock.patch.object(kernel_calls, "launch", _launch))
        for module in list(sys.modules.values()):
            if getattr(module, "arch_of", None) is launches.arch_of and module is not launches:
                stack.enter_context(mock.patch.object(module, "arch_of", lambda device: arch))
        stack.enter_context(_Unfilled())
        yield


def _launch(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: Mapping[str, Any], config: Launch
) -> None:
    """`kernel_calls.launch`, which keeps what was compiled, through Triton's own way."""
    kernel[(programs,)](*args, **constants, **config.blocks, **config.options())


def with_batch(call: OpCall, batch: int) -> OpCall:
    """The same call for `batch` images: tensors of unset values, in the layouts of the sample's.

    Tensors that images do not share (by their argument's name) grow; all others stay.
    """
    first = next(t for _, t in call.tensors())

    def grown(name: str, t: torch.Tensor) -> torch.Tensor:
        shared = any(part in name for part in _SHARED) and name != "drop_scale"
        if shared or t.ndim == 0 or t.shape[0] != first.shape[0]:
            return t
        order = sorted(range(1, t.ndim), key=lambda i: -t.stride()[i])
        back = [0, *order]
        made = t.new_empty([batch, *(t.shape[i] for i in order)])
        return made.permute([back.index(i) for i in range(t.ndim)])

    return call.changed(**{name: grown(name, t) for name, t in call.tensors()})


def real_call(spec: OpSpec, sample: Sample, dtype: torch.dtype, batch: int) -> tuple[OpCall, Cost]:
    """A real sample's call for a batch, and its cost by the spec."""
    args, kwargs = sample.make(dtype, generator_of(spec.name, sample.name, dtype))
    signature = inspect.signature(spec.public)
    bound = signature.bind(*args, **kwargs)
    call = with_batch(OpCall(signature, dict(bound.arguments)), batch)
    bound = inspect.BoundArguments(signature, dict(call.arguments))
    return call, spec.cost(bound.args, bound.kwargs)


def passes(call: OpCall, public: Callable[..., Any], arch: Arch) -> dict[str, list[Recorded]]:
    """Launches of a call's inference ("forward") and of its backward ("backward")."""
    with torch.no_grad():
        forward = record(lambda: call.run(public), arch)
    trained = call.requiring_grad([n for n in call.floating() if n not in _CONSTANT])
    outputs: list[torch.Tensor] = []
    record(lambda: outputs.extend(trained.run(public)), arch)
    wanted = [o for o in outputs if o.requires_grad]
    backward = record(
        lambda: torch.autograd.backward(wanted, [torch.empty_like(o) for o in wanted]), arch
    )
    return {"forward": forward, "backward": backward}


def as_compiled(launch: Recorded, arch: Arch) -> Any:
    """Triton's compiled kernel of a launch, specialised as its launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, {}, {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        signature[name] = _type_of(value)
        if _is_constant(launch, i, value):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Array) or (type(value) is int and value % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", arch.capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def _is_constant(launch: Recorded, i: int, value: Any) -> bool:
    """Whether Triton compiles an argument in: constexpr, None, or the number 1."""
    is_one = type(value) is int and value == 1
    return bool(launch.kernel.params[i].is_constexpr) or value is None or is_one


def run_time(launch: Recorded) -> list[Any]:
    """The arguments that the compiled kernel takes, in its order."""
    values = launch.arguments.values()
    return [v for i, v in enumerate(values) if not _is_constant(launch, i, v)]


def _type_of(value: Any) -> str:
    if isinstance(value, Array):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
