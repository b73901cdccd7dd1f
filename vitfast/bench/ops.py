"""Timing one op: plain PyTorch, compiled PyTorch and each backend beside what vitfast picks."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from vitfast import ops
from vitfast.bench import machine, memory
from vitfast.bench.modules import TRAIN_WORK, block_case, model_case
from vitfast.bench.peers import PeerUnavailableError, Setting
from vitfast.bench.progress import Progress
from vitfast.bench.record import Result, Row
from vitfast.bench.timer import interleave, stopwatch
from vitfast.errors import BackendUnavailableError, InputValueError, first_line
from vitfast.ops.attention import vendor
from vitfast.ops.spec import Cost, OpSpec, Sample
from vitfast.testing.cases import CONSTANT, NOT_TRAINED
from vitfast.testing.errors import compare
from vitfast.testing.inputs import OpCall, map_tensors, materialise

WHOLE_ONLY = ("onnxruntime", "openvino")
"""Peers that run whole modules, no single ops."""
BACKENDS = ("cuda", "triton", "vendor", "cpu")
"""Backends that are contenders of their own."""
ATTENTION_KERNELS = vendor.UNMASKED
"""A vendor's kernels for attention on GPUs, as contenders of their own."""
UNTRAINED = CONSTANT | NOT_TRAINED | {"image"}
"""Arguments that no model asks gradients of."""


@dataclass(frozen=True)
class OpCase:
    """One op on one set of inputs.

    Args:
        autocast: whether it runs under autocast, as calls do that were taken from a model.
    """

    spec: OpSpec
    sample: Sample
    setting: Setting
    autocast: bool = False

    @property
    def large(self) -> bool:
        """Whether plain PyTorch's intermediates may not fit in memory."""
        return "large" in self.sample.tags


def specs(names: Sequence[str] | None) -> list[OpSpec]:
    """The OpSpecs of these names, all by default.

    Raises:
        InputValueError: no op has this name.
    """
    for name in names or ():
        if name not in ops.NAMES:
            raise InputValueError(f"no op {name!r}; there is {', '.join(ops.NAMES)}")
    return [ops.spec_of(name) for name in ops.NAMES if not names or name in names]


def real_cases(
    found: Sequence[OpSpec], setting: Setting, sample: str | None = None
) -> list[OpCase]:
    """Samples of real models' shapes; "large" ones only when asked for by name."""
    return [
        OpCase(spec, s, setting)
        for spec in found
        if setting.dtype in spec.dtypes
        for s in spec.samples
        if (s.name == sample if sample else "real" in s.tags and "large" not in s.tags)
    ]


def model_cases(
    found: Sequence[OpSpec],
    name: str,
    img_size: tuple[int, int] | None,
    batch: int,
    setting: Setting,
) -> list[OpCase]:
    """What a model's patch embedding and first block pass to each op, each shape once.

    Raises:
        InputValueError: no such model, no blocks in it, or a size that it cannot take.
    """
    from vitfast.swap import swap

    training = replace(setting, train=True)  # in which layers call the public ops
    taken: dict[Any, OpCase] = {}
    block = block_case(name, img_size, batch, training)
    with _recording(found, name, setting, taken), setting.autocast():
        whole = model_case(name, img_size, batch, training)
        patch_embed = getattr(whole.module, "patch_embed", None)
        if patch_embed is not None:
            swap(whole.module)
            patch_embed(*whole.inputs)
        del whole
        swap(block.module)
        block.module(*block.inputs)
    return list(taken.values())


def measure(
    case: OpCase,
    wanted: Sequence[str],
    *,
    seconds: float = 1.0,
    with_memory: bool = True,
    progress: Progress | None = None,
) -> Row:
    """Time one op on one sample, forward or forward and backward, and judge every output.

    Args:
        wanted: peers and backends by name.
        seconds: timed work, all contenders together.

    Raises:
        BackendUnavailableError: not even backend="auto" can run the op here.
    """
    say = progress or (lambda text, share: None)
    spec, sample, setting = case.spec, case.sample, case.setting
    call = materialise(spec, sample, setting.dtype).map(lambda t: t.to(setting.device))
    row = Row(
        "ops", f"{spec.name} {sample.name}", _shape(call),
        str(setting.dtype).removeprefix("torch."), "train" if setting.train else "infer",
        setting.device.split(":")[0],
    )  # fmt: skip
    say(f"preparing {row.case}", 0.0)
    judge = None if case.large else Judge(case, call)
    calls: dict[str, Callable[[], Any]] = {}
    for name in (*wanted, "vitfast"):
        try:
            calls[name] = contender(case, call, name)
        except (BackendUnavailableError, PeerUnavailableError) as error:
            row.results[name] = Result(reason=first_line(error, last=True))
    added: dict[str, float | None] = {}
    for name, timed in calls.items():
        added[name] = memory.added_by(timed, setting.device) if with_memory else None
    if "vitfast" not in calls:
        raise BackendUnavailableError(f"{row.case}: {row.results['vitfast'].reason}")
    calls["vitfast"]()
    row.backend = spec.dispatcher.picked or ""
    timings = interleave(
        calls,
        seconds=seconds,
        watch=stopwatch(setting.device),
        check=judge,
        on_progress=lambda share: say(row.case, share),
    )
    for name, timing in timings.items():
        worst = judge.worst.get(name) if judge else None
        row.results[name] = Result.of(timing, peak_mb=added[name], error_over_budget=worst)
    if case.large:
        row.note = "error not measured: the plain reference may not fit in memory"
    cost = spec.cost(*as_passed(call))
    if setting.train:
        cost = Cost(TRAIN_WORK * cost.flops, TRAIN_WORK * cost.bytes)
    machine.rate(row, cost, setting.device, setting.dtype)
    return row


class Judge:
    """Error over budget of a contender's outputs and gradients, by the op's own criterion.

    The budget is a multiple of what the op's reference errs in the working dtype against float64.
    """

    def __init__(self, case: OpCase, call: OpCall) -> None:
        self.worst: dict[str, float] = {}
        """Contender -> the largest error over budget of all its outputs that were judged."""
        self.spec = case.spec
        seeds: list[torch.Tensor] = []
        self.base = [t.clone() for t in _runner(case, call, case.spec.reference, seeds)()]
        exact = replace(case, autocast=False)
        # The gradients that came in, as they were rounded.
        seeds = [seed.double() for seed in seeds]
        self.reference = _runner(exact, call.float64(), case.spec.reference, seeds)()
        self.outputs = len(call.run(case.spec.reference)) if case.setting.train else len(self.base)

    def __call__(self, name: str, output: Sequence[torch.Tensor]) -> float:
        """The error over budget of one call's outputs, and gradients after them in training."""
        errors = [0.0]
        for i, tensors in enumerate(zip(output, self.reference, self.base, strict=True)):
            factor = self.spec.forward_factor if i < self.outputs else self.spec.backward_factor
            report = compare(*tensors, name=name, factor=factor, rms_factor=self.spec.rms_factor)
            errors.append(math.inf if report.mask_mismatches else report.error_over_budget)
        self.worst[name] = max(self.worst.get(name, 0.0), *errors)
        return max(errors)


def contender(case: OpCase, call: OpCall, name: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The call of a contender, which has run once, so that what it cannot do is known here.

    Raises:
        PeerUnavailableError: this contender cannot run the case; the message is the reason.
        BackendUnavailableError: the same, of one of the op's backends.
    """
    spec = case.spec
    if name in WHOLE_ONLY:
        raise PeerUnavailableError("runs blocks and models, not single ops")
    if name in ("eager", "compile") and case.large:
        raise PeerUnavailableError("its intermediates may not fit in memory")
    if name == "eager":
        function = spec.reference
    elif name == "compile":
        torch._dynamo.reset()
        function = torch.compile(spec.reference, dynamic=False)
    elif name == "vitfast":
        function = functools.partial(spec.public, backend="auto")
    elif name in ATTENTION_KERNELS:
        _check_vendor_kernel(case, call)
        function = functools.partial(spec.public, backend="vendor")
    elif name in spec.dispatcher.backends:
        function = functools.partial(spec.public, backend=name)
    else:
        raise PeerUnavailableError("this op has no such backend")
    runner = _runner(case, call, function)
    if name in ATTENTION_KERNELS:
        runner = _forced(runner, name)
    try:
        runner()
    except BackendUnavailableError:
        raise
    except Exception as error:
        if name == "vitfast":
            raise
        raise PeerUnavailableError(f"{name} failed: {first_line(error)}") from error
    return runner


def _check_vendor_kernel(case: OpCase, call: OpCall) -> None:
    """Raises PeerUnavailableError where none of the vendor's attention kernels is asked."""
    if case.spec.name != "attention":
        raise PeerUnavailableError("a kernel for attention")
    if not case.setting.device.startswith("cuda"):
        raise PeerUnavailableError("a kernel for GPUs")
    if set(as_passed(call)[1]) & {"mask", "bias"}:
        raise PeerUnavailableError("calls with a mask or bias run SDPA's memory-efficient kernel")


def _forced(
    runner: Callable[[], tuple[torch.Tensor, ...]], name: str
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward on one of the vendor's kernels."""

    def run() -> tuple[torch.Tensor, ...]:
        with vendor.forcing(name):
            return runner()

    return run


def _runner(
    case: OpCase, call: OpCall, function: Callable[..., Any],
    seeds: list[torch.Tensor] | None = None,
) -> Callable[[], tuple[torch.Tensor, ...]]:  # fmt: skip
    """Forward, or forward and backward; gives outputs, then gradients.

    Args:
        seeds: gradients of the outputs; filled in where it is empty.
    """
    context = replace(case.setting, dtype=case.setting.dtype if case.autocast else torch.float32)
    if not case.setting.train:

        def infer() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode(), context.autocast():
                return call.run(function)

        return infer

    names = [name for name in call.floating() if name not in UNTRAINED]
    leaves = call.requiring_grad(names)
    wanted = [leaves.arguments[name] for name in names]
    seeds = [] if seeds is None else seeds

    def both() -> tuple[torch.Tensor, ...]:
        with context.autocast():
            outputs = leaves.run(function)
        if not seeds:
            seeds.extend(g.to(case.setting.device) for g in call.output_grads(outputs))
        found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
        return (*(o.detach() for o in outputs), *(g for g in found if g is not None))

    return both


@contextmanager
def _recording(
    found: Sequence[OpSpec], model: str, setting: Setting, taken: dict[Any, OpCase]
) -> Iterator[None]:
    """Within, `taken` gets a case of each call of these ops in vitfast; the calls run.

    Args:
        found: the ops that are recorded.
        model: the name of the model, for the cases' names.
        taken: (op, shapes and dtypes of the arguments) -> case, so that each is kept once.
    """
    replaced: list[tuple[ModuleType, str, Any]] = []
    for spec in found:
        recorder = _recorder(spec, model, setting, taken)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("vitfast.") and module is not None:
                for name, value in list(vars(module).items()):
                    if value is spec.public:
                        replaced.append((module, name, value))
                        setattr(module, name, recorder)
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def _recorder(
    spec: OpSpec, model: str, setting: Setting, taken: dict[Any, OpCase]
) -> Callable[..., Any]:
    """The public op of a spec, which also takes note of what it is called with."""
    # What the formula depends on, not hints such as where else x is kept.
    meant = set(inspect.signature(spec.reference).parameters)

    @functools.wraps(spec.public)
    def record(*args: Any, **kwargs: Any) -> Any:
        arguments = (args, {name: value for name, value in kwargs.items() if name in meant})
        kept = map_tensors(arguments, lambda t: t.detach().clone())
        facts = map_tensors(arguments, lambda t: (tuple(t.shape), t.dtype))
        number = sum(c.spec is spec for c in taken.values()) + 1
        sample = Sample(f"{model} #{number}", lambda dtype, generator: kept)
        taken.setdefault((spec.name, repr(facts)), OpCase(spec, sample, setting, autocast=True))
        return spec.public(*args, **kwargs)

    return record


def as_passed(call: OpCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the form of the specs' samples, whatever form the caller chose.

    Positional ones with their defaults up to the last that is not None, keyword ones that are not.
    """
    bound = inspect.BoundArguments(call.signature, dict(call.arguments))
    bound.apply_defaults()
    args = bound.args
    while args and args[-1] is None:
        args = args[:-1]
    return args, {name: value for name, value in bound.kwargs.items() if value is not None}


def _shape(call: OpCall) -> str:
    """The shape of the first tensor: what a reader looks for."""
    return "x".join(str(n) for n in next(t for _, t in call.tensors()).shape)
