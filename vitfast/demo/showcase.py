"""The demo's runs: timm beside vitfast on one photograph, in one process, in turns."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from vitfast.bench import memory, modules, peers, zoo
from vitfast.bench.modules import Case
from vitfast.bench.peers import Setting
from vitfast.bench.timer import Timing, interleave, stopwatch
from vitfast.errors import InputValueError
from vitfast.testing.errors import compare

if TYPE_CHECKING:
    from PIL.Image import Image

    from vitfast.swap import SwapReport

SECONDS_IN_ALL = 105.0
"""What the demo plans for on two cores; the rest of two minutes is for start, build and report."""
SECONDS_A_MODEL = 3.0
ROUNDS = 3
FLOAT64_COST = 3.5
"""Upper guess of a float64 forward over a float32 one: half the lanes, no prepacked weights."""
MODELS = (
    "vit_base_patch16_224@224",
    "convnext_tiny@288",
    "vit_small_patch14_dinov2@518",
    "vit_small_patch16_dinov3@256",
    "vit_base_patch16_224@1024",
)
"""The quickest first, so that what is learned there serves the slowest."""


@dataclass
class Outcome:
    """What one model showed. Times in ms, memory in MB beyond the weights that both share.

    Args:
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
    timm_mb: float | None = None
    vitfast_mb: float | None = None
    error: float = 0.0
    budget: float = 0.0
    budget_from: str = ""
    agreement: int | None = None
    labels: list[tuple[str, float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        size = str(self.height) if self.height == self.width else f"{self.height}x{self.width}"
        return f"{self.name} @ {size}"

    @property
    def ratio(self) -> float:
        return self.timm_ms / self.vitfast_ms

    @property
    def within_budget(self) -> bool:
        return self.error <= self.budget

    def swapped_classes(self) -> str:
        """ "12 Block, 25 LayerNorm": what was swapped, by timm class."""
        counts = Counter(entry.timm_class for entry in self.report.swapped)
        return ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing"

    def skipped_reasons(self) -> list[str]:
        """One line a class and reason of what was left to timm."""
        counts = Counter((entry.timm_class, entry.reason) for entry in self.report.skipped)
        return [f"{n} {name}: {reason}" for (name, reason), n in counts.items()]

    def as_json(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "report"}
        return {**plain, "ratio": self.ratio, "swap": self.report.to_dict()}


def parse_models(text: str | None) -> list[tuple[str, tuple[int, int] | None]]:
    """(name, size) out of "vit_base_patch16_224@1024,vit_tiny_patch16_224".

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
        clock: seconds; for tests.
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
        self._budgets: dict[str, tuple[float, str]] = {}  # model -> relative budget, of what

    def warm_up(self) -> None:
        """Load the libraries' code and start their threads, or the first model would pay for it."""
        case = modules.model_case("vit_tiny_patch16_224", (32, 32), 1, self.setting, depth=1)
        for factory in (peers.eager, peers.vitfast):
            factory(case.module, case.inputs, self.setting)()

    def run(
        self, name: str, size: tuple[int, int] | None, say: Callable[[str, float], None]
    ) -> Outcome:
        """One model: swap, memory, time, error.

        Raises:
            InputValueError: the model cannot be had or cannot take this size.
        """
        from vitfast.swap import swap

        say(f"building {name}", 0.0)
        model = zoo.build(name, size, device=self.setting.device, pretrained=self.pretrained)
        image = self._image(model, size)
        fast = peers.sharing_copy(model)
        outcome = Outcome(
            name, *image.shape[-2:], str(self.setting.dtype).removeprefix("torch."), swap(fast)
        )
        calls = {
            "timm": _Watched(peers.eager(model, (image,), self.setting), self.setting.device),
            "vitfast": _Watched(peers.eager(fast, (image,), self.setting), self.setting.device),
        }
        outputs: dict[str, torch.Tensor] = {}
        say(f"first run of {outcome.title}", 0.1)
        try:
            for key, call in calls.items():
                outputs[key] = call()
        except zoo.UNFIT as error:
            raise InputValueError(f"{outcome.title}: {peers.first_line(error)}") from error
        timings = self._timings(
            calls, outputs, lambda share: say(f"timing {outcome.title}", 0.1 + 0.6 * share)
        )
        outcome.timm_ms = timings["timm"].median * 1e3
        outcome.vitfast_ms = timings["vitfast"].median * 1e3
        outcome.rounds = len(timings["timm"].samples)
        outcome.timm_mb, outcome.vitfast_mb = calls["timm"].added, calls["vitfast"].added
        del calls, fast
        gc.collect()
        say(f"float64 reference of {outcome.title}", 0.7)
        self._judge(outcome, Case("models", name, model, (image,), self.setting), outputs)
        self._classify(outcome, outputs)
        say(outcome.title, 1.0)
        return outcome

    def _image(self, model: torch.nn.Module, size: tuple[int, int] | None) -> torch.Tensor:
        config = resolve_data_config(model.pretrained_cfg)
        config |= {"input_size": zoo.image_shape(model, size), "crop_pct": 1.0}
        return create_transform(**config)(self.photo)[None].to(self.setting.device)

    def _timings(
        self,
        calls: dict[str, _Watched],
        outputs: dict[str, torch.Tensor],
        on_progress: Callable[[float], None],
    ) -> dict[str, Timing]:
        """As many rounds as fit beside the float64 run; with no time left, the first run."""
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
        """Twice timm's own error against float64 is the budget; where time forbids, see below."""
        timm, ours = outputs["timm"], outputs["vitfast"]
        if outcome.timm_ms / 1e3 * FLOAT64_COST < self.end - self.clock():
            reference = modules.reference_outputs(case)[0]
            report = compare(ours, reference, timm, factor=2.0, name=outcome.title)
            outcome.error, outcome.budget = report.max_error, report.max_allowed
            if report.mask_mismatches:
                outcome.error = float("inf")
            outcome.budget_from = "2x timm's own error against float64"
            relative = report.max_allowed / float(reference.abs().max())
            measured = (relative, f"the relative budget of {outcome.title}")
            self._budgets[outcome.name] = max(measured, self._budgets.get(outcome.name, measured))
            return
        # Both err, each within its budget: timm by half of it, vitfast by all of it.
        outcome.error = float((ours.double() - timm.double()).abs().max())
        known, where = self._budgets.get(outcome.name) or max(
            self._budgets.values(),
            default=(64 * torch.finfo(self.setting.dtype).eps, "64 units in the last place"),
        )
        outcome.budget_from = (
            f"too slow for float64 here: largest difference from timm, against 1.5x {where}"
        )
        outcome.budget = 1.5 * known * float(timm.double().abs().max())

    def _classify(self, outcome: Outcome, outputs: dict[str, torch.Tensor]) -> None:
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
    """A call that notes the memory and the time of its first run."""

    def __init__(self, call: peers.Call, device: str) -> None:
        self.call = call
        self.device = device
        self.seconds = 0.0
        self.added: float | None = None
        self.ran = False

    def __call__(self) -> Any:
        if self.ran:
            return self.call()
        self.ran = True
        outputs = []
        start = time.perf_counter()
        self.added = memory.added_by(lambda: outputs.append(self.call()), self.device)
        self.seconds = time.perf_counter() - start
        return outputs[0]
