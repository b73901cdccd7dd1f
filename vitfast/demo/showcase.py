"""The demo's runs: timm beside vitfast on one photograph, in one process, in turns."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from vitfast.bench import child, modules, peers, zoo
from vitfast.bench.modules import Case
from vitfast.bench.peers import Setting
from vitfast.bench.progress import Progress
from vitfast.bench.report import digits
from vitfast.bench.timer import Timing, interleave, stopwatch
from vitfast.errors import InputValueError, first_line
from vitfast.swap import SwapReport, swap
from vitfast.testing.errors import compare

SECONDS_IN_ALL = 105.0
"""What timing and judging all models may take together, on two cores; their memory is measured
afterwards, and the demo's other sections have times of their own."""
SECONDS_A_MODEL = 3.0
"""Timed work a model, both contenders together."""
ROUNDS = 3
"""Times that each contender is timed at least, where the time for all models allows it."""
FLOAT64_COST = 3.5
"""How many times a float64 forward may take of timm's own: half the lanes, no prepacked weights."""
MARGIN = 1.5
"""How many budgets vitfast may differ from timm, whose own error is half a budget."""
MODELS = (
    "vit_base_patch16_224@224",
    "convnext_tiny@288",
    "vit_small_patch14_dinov2@518",
    "vit_small_patch16_dinov3@256",
    "vit_base_patch16_224@1024",
)
"""The quickest first: the error budget that is measured there serves where float64 is too slow."""


@dataclass
class Outcome:
    """What one model showed.

    Args:
        dtype: working dtype, such as "float32".
        timm_ms, vitfast_ms: medians over `rounds` rounds.
        timm_quartiles_ms, vitfast_quartiles_ms: the 25th and 75th percentile; None of one round.
        timm_mb, vitfast_mb: peak of inference in MB, weights included, each from a process of its
            own; None where it was not measured, and `memory_reason` says why.
        error: max |vitfast - reference|, or max |vitfast - timm| where there is no reference.
        budget: what `error` may be; `budget_from` says in words how it was obtained.
        agreement: how many of timm's five most likely classes are vitfast's, in the same order;
            None for a model without a classifier.
        labels: the likeliest classes by name and probability, with pretrained weights only.
    """

    name: str
    height: int
    width: int
    dtype: str
    report: SwapReport
    timm_ms: float = 0.0
    vitfast_ms: float = 0.0
    rounds: int = 0
    timm_quartiles_ms: tuple[float, float] | None = None
    vitfast_quartiles_ms: tuple[float, float] | None = None
    timm_mb: float | None = None
    vitfast_mb: float | None = None
    memory_reason: str = "not measured in this run"
    error: float = 0.0
    budget: float = 0.0
    budget_from: str = ""
    agreement: int | None = None
    labels: list[tuple[str, float]] = field(default_factory=list)

    @property
    def size(self) -> str:
        """As users write it: "224", or "2160x3840" for height and width."""
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def title(self) -> str:
        return f"{self.name} @ {self.size}"

    @property
    def ratio(self) -> float:
        """How many times faster than timm vitfast is."""
        return self.timm_ms / self.vitfast_ms

    @property
    def within_budget(self) -> bool:
        """Whether the outputs are right."""
        return self.error <= self.budget

    @property
    def pace(self) -> str:
        """ "faster" or "slower" than timm where the two interquartile ranges lie apart, else
        "level"; by the medians alone where one round leaves no ranges."""
        low, high = self.vitfast_quartiles_ms or (self.vitfast_ms, self.vitfast_ms)
        timm_low, timm_high = self.timm_quartiles_ms or (self.timm_ms, self.timm_ms)
        return "faster" if high < timm_low else "slower" if low > timm_high else "level"

    def swapped_classes(self) -> str:
        """What was swapped, by timm class, as in "12 Block, 25 LayerNorm"."""
        counts = Counter(entry.timm_class for entry in self.report.swapped)
        return ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing"

    def skipped_reasons(self) -> list[str]:
        """What was left to timm, a line for each class and reason: "1 Head: not implemented"."""
        counts = Counter((entry.timm_class, entry.reason) for entry in self.report.skipped)
        return [f"{n} {name}: {reason}" for (name, reason), n in counts.items()]

    def as_json(self) -> dict[str, Any]:
        """As values that JSON knows, the swap report among them."""
        plain = {k: v for k, v in vars(self).items() if k != "report"}
        return {**plain, "ratio": self.ratio, "swap": self.report.to_dict()}


@dataclass(frozen=True)
class Failure:
    """A model that gave no outcome, and why."""

    title: str
    reason: str


def verdict(outcomes: Sequence[Outcome], failures: Sequence[Failure] = ()) -> str:
    """What the outcomes come to, in one sentence."""
    failed = f"; failed: {', '.join(f.title for f in failures)}" if failures else ""
    if not outcomes:
        return f"No model could be compared{failed}."
    count = len(outcomes)
    paces = Counter(o.pace for o in outcomes)
    ratios = sorted(o.ratio for o in outcomes)
    said = [f"{pace} on {paces[pace]} of {count}" for pace in ("faster", "level", "slower")
            if paces[pace]]  # fmt: skip
    text = f"vitfast beside timm was {', '.join(said)} {'model' if count == 1 else 'models'} "
    shown = [f"{digits(ratio)}x" for ratio in dict.fromkeys((ratios[0], ratios[-1]))]
    text += f"({' to '.join(shown)} the speed)"
    known = [(o.timm_mb, o.vitfast_mb) for o in outcomes]
    less = [ours < theirs for theirs, ours in known if theirs is not None and ours is not None]
    if less:
        text += f", took less memory on {sum(less)} of {len(less)}"
    right = sum(o.within_budget for o in outcomes)
    return f"{text}, and kept the error budget on {right} of {count}{failed}."


def parse_models(text: str | None) -> list[tuple[str, tuple[int, int] | None]]:
    """(name, (height, width)) of each model in "vit_base_patch16_224@1024,vit_tiny_patch16_224".

    `MODELS` where the text is None; a size is None where a model is to have its own.

    Raises:
        InputValueError: no model, an unknown name, or a size that is none.
    """
    wanted = MODELS if text is None else [part.strip() for part in text.split(",") if part.strip()]
    if not wanted:
        raise InputValueError("--models: no model named")
    found = []
    for part in wanted:
        name, at, size = part.partition("@")
        zoo.check_name(name)
        found.append((name, zoo.parse_img_size(size) if at else None))
    return found


class Showcase:
    """Runs models one after another and keeps to a time for all of them.

    Args:
        photo: RGB image of any size.
        setting: dtype and device.
        pretrained: trained weights instead of random ones; also names what the models see.
        seconds: for all models together. A model that is late is timed fewer times and not compared
            with float64; it is never left out.
        clock: gives seconds; for tests.
    """

    def __init__(
        self,
        photo: Image,
        setting: Setting,
        *,
        pretrained: bool = False,
        seconds: float = SECONDS_IN_ALL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.photo = photo
        self.setting = setting
        self.pretrained = pretrained
        self.clock = clock
        self.end = clock() + seconds
        self._budgets: dict[str, tuple[float, Outcome]] = {}
        """Model -> the largest error budget measured on it, over its largest output, and where."""

    def warm_up(self) -> None:
        """Load the libraries' code and start their threads, which the first model would pay for."""
        case = modules.model_case("vit_tiny_patch16_224", (32, 32), 1, self.setting, depth=1)
        for factory in (peers.eager, peers.vitfast):
            factory(case.module, case.inputs, self.setting)()

    def run(self, name: str, size: tuple[int, int] | None, say: Progress) -> Outcome:
        """Swap one model, then measure time and error beside timm's.

        Args:
            size: (height, width); None for the model's own.
            say: gets what is going on, and the share of this model's work that is done.

        Raises:
            InputValueError: the model cannot be had or cannot take this size.
        """
        say(f"building {name}", 0.0)
        model = zoo.build(name, size, device=self.setting.device, pretrained=self.pretrained)
        image = self._image(model, size)
        fast = peers.sharing_copy(model)
        height, width = image.shape[-2:]
        dtype = str(self.setting.dtype).removeprefix("torch.")
        outcome = Outcome(name, height, width, dtype, swap(fast))
        calls = {
            "timm": _Watched(peers.eager(model, (image,), self.setting)),
            "vitfast": _Watched(peers.eager(fast, (image,), self.setting)),
        }
        outputs: dict[str, torch.Tensor] = {}
        say(f"first run of {outcome.title}", 0.1)
        try:
            for key, call in calls.items():
                outputs[key] = call()
        except zoo.UNFIT as error:
            raise InputValueError(f"{outcome.title}: {first_line(error)}") from error
        timings = self._timings(
            calls, outputs, lambda share: say(f"timing {outcome.title}", 0.1 + 0.6 * share)
        )
        outcome.timm_ms = timings["timm"].median * 1e3
        outcome.vitfast_ms = timings["vitfast"].median * 1e3
        outcome.rounds = len(timings["timm"].samples)
        if outcome.rounds > 1:
            timm, ours = ([1e3 * q for q in timings[key].quartiles] for key in calls)
            outcome.timm_quartiles_ms = (timm[0], timm[1])
            outcome.vitfast_quartiles_ms = (ours[0], ours[1])
        del calls, fast
        gc.collect()
        say(f"float64 reference of {outcome.title}", 0.7)
        self._judge(outcome, Case("models", name, model, (image,), self.setting), outputs)
        self._classify(outcome, outputs)
        say(outcome.title, 1.0)
        return outcome

    def measure_memory(self, outcome: Outcome, say: Progress) -> None:
        """Fill in the peaks of both contenders, each from a process of its own on random weights
        and pixels; or the reason why there are none."""
        arguments = {
            "model": outcome.name, "img_size": (outcome.height, outcome.width), "batch": 1,
            "dtype": outcome.dtype, "device": self.setting.device, "train": False,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        peaks: list[float | None] = []
        for i, contender in enumerate(("eager", "vitfast")):
            say(f"memory of {outcome.title}", i / 2)
            try:
                peaks.append(child.peak_in_child({**arguments, "contender": contender}))
            except child.ChildError as error:
                outcome.memory_reason = f"the process that measures it failed: {error}"
                return
        outcome.timm_mb, outcome.vitfast_mb = peaks
        outcome.memory_reason = ""
        if None in peaks:
            outcome.memory_reason = child.UNTOLD
        say(f"memory of {outcome.title}", 1.0)

    def _image(self, model: torch.nn.Module, size: tuple[int, int] | None) -> torch.Tensor:
        """The photograph as the model's own preprocessing makes it, [1, 3, height, width]."""
        config = resolve_data_config(model.pretrained_cfg)
        config |= {"input_size": zoo.image_shape(model, size), "crop_pct": 1.0}
        return create_transform(**config)(self.photo)[None].to(self.setting.device)

    def _timings(
        self,
        calls: dict[str, _Watched],
        outputs: dict[str, torch.Tensor],
        on_progress: Callable[[float], None],
    ) -> dict[str, Timing]:
        """Time both in turns, as often as time allows; where none is left the first run counts.

        Args:
            outputs: of the first runs; the last ones take their place.
        """
        once = sum(call.seconds for call in calls.values())
        fits = int((self.end - self.clock()) / max(once, 1e-9))
        if fits < 1:
            return {key: Timing((call.seconds,)) for key, call in calls.items()}
        return interleave(
            calls,
            seconds=SECONDS_A_MODEL,
            min_rounds=max(1, min(ROUNDS, fits - 1)),
            ran_before={key: call.seconds for key, call in calls.items()},
            watch=stopwatch(self.setting.device),
            check=outputs.__setitem__,
            on_progress=on_progress,
        )

    def _judge(self, outcome: Outcome, case: Case, outputs: dict[str, torch.Tensor]) -> None:
        """Fill in the error, its budget, and how that was obtained.

        The budget is twice timm's own error against float64 where there is time for a float64 run,
        else one that was measured before.
        """
        timm, ours = outputs["timm"], outputs["vitfast"]
        if outcome.timm_ms / 1e3 * FLOAT64_COST >= self.end - self.clock():
            self._judge_by_difference(outcome, timm, ours)
            return
        reference = modules.reference_outputs(case)[0]
        report = compare(ours, reference, timm, factor=2.0, name=outcome.title)
        outcome.error, outcome.budget = report.max_error, report.max_allowed
        if report.mask_mismatches:
            outcome.error = float("inf")
        outcome.budget_from = "2x timm's own error against float64"
        relative = report.max_allowed / float(reference.abs().max())
        if relative > self._budgets.get(outcome.name, (0.0,))[0]:
            self._budgets[outcome.name] = (relative, outcome)

    def _judge_by_difference(
        self, outcome: Outcome, timm: torch.Tensor, ours: torch.Tensor
    ) -> None:
        """As `_judge` without a float64 run.

        The budget is one that was measured before: of this model, or else the largest of any. Where
        timm errs by half of it and vitfast by all of it, they differ by `MARGIN` budgets at most.
        """
        why = "too slow for float64 here"
        if outcome.name in self._budgets:
            relative, measured = self._budgets[outcome.name]
            source = f"the budget measured at {measured.size}"
        elif self._budgets:
            relative, measured = max(self._budgets.values(), key=lambda found: found[0])
            why += ", and no smaller size ran"
            source = f"the budget measured on {measured.title}"
        else:
            relative = 64 * torch.finfo(self.setting.dtype).eps
            why += ", and no smaller size ran"
            source = "64 units in the last place"
        outcome.budget_from = f"{why}: largest difference from timm, against {MARGIN}x {source}"
        outcome.error = float((ours.double() - timm.double()).abs().max())
        outcome.budget = MARGIN * relative * float(timm.double().abs().max())

    def _classify(self, outcome: Outcome, outputs: dict[str, torch.Tensor]) -> None:
        """Fill in how far both agree on the likeliest classes, and what they are called."""
        timm, ours = (outputs[key][0].float() for key in ("timm", "vitfast"))
        if timm.numel() < 1000:
            return  # features, as of DINOv2 and DINOv3: there is nothing to name
        outcome.agreement = int((timm.topk(5).indices == ours.topk(5).indices).sum())
        if self.pretrained and timm.numel() == 1000:
            info = ImageNetInfo()
            chances = ours.softmax(0).topk(5)
            outcome.labels = [
                (info.index_to_description(int(i)), float(p))
                for p, i in zip(chances.values, chances.indices, strict=True)
            ]


class _Watched:
    """A call that notes the seconds of its first run."""

    def __init__(self, call: peers.Call) -> None:
        self.call = call
        self.seconds = 0.0

    def __call__(self) -> Any:
        if self.seconds:
            return self.call()
        start = time.perf_counter()
        output = self.call()
        self.seconds = time.perf_counter() - start
        return output
