"""Timing a block or a whole model beside its peers."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitfast.bench import machine, memory, peers, zoo
from vitfast.bench.peers import PeerUnavailableError, Setting
from vitfast.bench.progress import Progress
from vitfast.bench.record import Result, Row
from vitfast.bench.timer import interleave, stopwatch
from vitfast.errors import InputValueError
from vitfast.ops.spec import Cost, tensor_bytes
from vitfast.testing.errors import compare
from vitfast.testing.inputs import map_tensors, to_float64

REFERENCE_FLOPS = {"cpu": 3e12, "cuda": 3e14}
"""Operations of a case by device; above, its float64 run would take longer than the timing."""
TRAIN_WORK = 3.0
"""Work of a training step over that of a forward, whose every product has two in the backward."""


@dataclass
class Case:
    """A plain timm module, in the mode that the setting asks for, with inputs that suit it.

    Args:
        level: "blocks" or "models".
        name: of the timm model.
    """

    level: str
    name: str
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    setting: Setting

    @property
    def shape(self) -> str:
        """Of the first input, as in "1x3x224x224"."""
        return "x".join(str(n) for n in self.inputs[0].shape)

    def cost(self) -> Cost:
        """Operations of the matrix products, and bytes of weights and inputs, each read once.

        In training three times as many of both.
        """
        work = TRAIN_WORK if self.setting.train else 1.0
        module = self.module
        if isinstance(module, Fixed):
            module = module.with_others(lambda t: t.to("meta"))
        moved = tensor_bytes(*self.module.parameters(), *self.inputs)
        return Cost(work * zoo.flops(module, self.name, self.inputs), work * moved)


class Fixed(nn.Module):
    """A block as a function of x alone; its other arguments (a rotary embedding, say) stay."""

    def __init__(self, block: nn.Module, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self.rest = rest
        self.kwargs = kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, *self.rest, **self.kwargs)

    def with_others(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Fixed:
        """The same block with every tensor among its other arguments changed."""
        return Fixed(
            self.block, map_tensors(self.rest, change), map_tensors(self.kwargs, change)
        ).train(self.training)


class _Captured(Exception):
    """Ends a forward at the block whose arguments it carries."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = (args, kwargs)


def model_case(
    name: str,
    img_size: tuple[int, int] | None,
    batch: int,
    setting: Setting,
    seed: int = 0,
    **timm_kwargs: Any,
) -> Case:
    """A whole model on images of N(0, 1) values.

    Args:
        img_size: (height, width); None for the model's own.
        timm_kwargs: passed to the model's constructor.

    Raises:
        InputValueError: no such model, or a size that it cannot take.
    """
    model = zoo.build(name, img_size, device=setting.device, seed=seed, **timm_kwargs)
    model.train(setting.train)
    image = _image(model, img_size, batch, setting, seed)
    return Case("models", name, model, (image,), setting)


def block_case(
    name: str, img_size: tuple[int, int] | None, batch: int, setting: Setting, seed: int = 0
) -> Case:
    """The first block of a model, on what reaches it there when the model gets an image.

    Raises:
        InputValueError: no such model, no `blocks` in it, or a size that it cannot take.
    """
    model = zoo.build(name, img_size, device=setting.device, seed=seed)
    lists = (getattr(m, "blocks", None) for m in model.modules())  # of the model, or its stages
    blocks = next((b for b in lists if isinstance(b, (nn.ModuleList, nn.Sequential))), None)
    if not blocks:
        raise InputValueError(f"{name} has no list of blocks")

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(args, kwargs)

    handle = blocks[0].register_forward_pre_hook(capture, with_kwargs=True)
    image = _image(model, img_size, batch, setting, seed)
    try:
        with torch.no_grad(), setting.autocast():
            zoo.checked_forward(model, name, image)
    except _Captured as found:
        (x, *rest), kwargs = found.arguments
    else:
        raise InputValueError(f"{name} does not run its blocks one after another")
    finally:
        handle.remove()
    fixed = Fixed(blocks[0], tuple(rest), kwargs).train(setting.train)
    return Case("blocks", name, fixed, (x.detach(),), setting)


def measure(
    case: Case,
    wanted: Sequence[str],
    *,
    seconds: float = 4.0,
    with_memory: bool = True,
    progress: Progress | None = None,
) -> Row:
    """Time vitfast and the peers in turns, and judge every output against float64.

    Where nothing of the module is swapped, vitfast has no time and the peers have theirs. Of a
    model on the CPU no memory is measured here; see `vitfast.bench.child`.

    Args:
        wanted: peers by name.
        seconds: timed work, all contenders together.
    """
    say = progress or (lambda text, share: None)
    setting = case.setting
    row = Row(
        case.level, case.name, case.shape, str(setting.dtype).removeprefix("torch."),
        "train" if setting.train else "infer", setting.device.split(":")[0],
    )  # fmt: skip
    say("ceilings of this machine", 0.0)
    cost = case.cost()
    judge = None
    if cost.flops > REFERENCE_FLOPS[setting.device.split(":")[0]]:
        row.note = "error not measured: the float64 run would take too long"
    else:
        say("float64 reference", 0.0)
        try:
            judge = Judge(case)
        except torch.OutOfMemoryError:
            row.note = "error not measured: the float64 reference does not fit in memory"
        gc.collect()
        if setting.device.startswith("cuda"):
            torch.cuda.empty_cache()
    calls = {}
    for name in (*wanted, "vitfast"):
        say(f"preparing {name}", 0.0)
        try:
            calls[name] = peers.FACTORIES[name](case.module, case.inputs, setting)
        except PeerUnavailableError as error:
            row.results[name] = Result(reason=str(error))
        gc.collect()
    added = {}
    if with_memory and (case.level == "blocks" or setting.device.startswith("cuda")):
        held = 0.0 if case.level == "blocks" else _megabytes(case.module)
        for name, call in calls.items():
            more = memory.added_by(call, setting.device)
            added[name] = None if more is None else held + more
    timings = {}
    if calls:  # a model that is not swapped may have no other contender either
        timings = interleave(
            calls,
            seconds=seconds,
            settle=True,
            watch=stopwatch(setting.device),
            check=judge,
            on_progress=lambda share: say("timing", share),
        )
    for name, timing in timings.items():
        row.results[name] = Result.of(
            timing,
            peak_mb=added.get(name),
            error_over_budget=judge.worst.get(name) if judge else None,
        )
    del calls
    machine.rate(row, cost, setting.device, setting.dtype)
    return row


def _megabytes(module: nn.Module) -> float:
    """MB (10^6 bytes) that its parameters and buffers take."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values()) / 1e6


class Judge:
    """Error over budget of a contender's output: 1 is the limit.

    The budget of an output is twice what timm itself errs in this dtype against float64, that of a
    gradient three times as much, as for ops.
    """

    def __init__(self, case: Case) -> None:
        self.worst: dict[str, float] = {}
        """Contender -> the largest error over budget of all its outputs that were judged."""
        self.base = _outputs(peers.eager(case.module, case.inputs, case.setting)())
        self.reference = reference_outputs(case)

    def __call__(self, name: str, output: Any) -> float:
        """The error over budget of one output (or output and gradients) of a contender."""
        errors = [0.0]
        tensors = zip(_outputs(output), self.base, self.reference, strict=True)
        for i, (t, base, reference) in enumerate(tensors):
            factor = 2.0 if i == 0 else 3.0
            report = compare(t.to(base.dtype), reference, base, factor=factor, name=name)
            errors.append(math.inf if report.mask_mismatches else report.error_over_budget)
        self.worst[name] = max(self.worst.get(name, 0.0), *errors)
        return max(errors)


def reference_outputs(case: Case) -> list[torch.Tensor]:
    """Output (and gradients, in training) in float64, of the same rounded weights and inputs."""
    module = copy.deepcopy(case.module).double()
    inputs = tuple(x.double() for x in case.inputs)
    if isinstance(module, Fixed):
        module = module.with_others(to_float64)
    plain = Setting(torch.float32, case.setting.device, case.setting.train)
    return _outputs(peers.eager(module, inputs, plain)())


def _outputs(output: Any) -> list[torch.Tensor]:
    """Copies, which the contender's next call leaves alone."""
    tensors: Iterable[torch.Tensor] = [output] if isinstance(output, torch.Tensor) else output
    return [t.detach().clone() for t in tensors]


def _image(
    model: nn.Module, img_size: tuple[int, int] | None, batch: int, setting: Setting, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, *zoo.image_shape(model, img_size), generator=generator)
    return image.to(setting.device)
