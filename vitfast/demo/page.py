"""The demo's report as one HTML page that loads nothing from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from vitfast.bench.report import MISSING, digits, milliseconds
from vitfast.demo.attention import Attention
from vitfast.demo.duplicates import Duplicates
from vitfast.demo.large import Large, Way, share
from vitfast.demo.photo import Photograph
from vitfast.demo.showcase import Failure, Outcome, verdict
from vitfast.demo.template import PAGE
from vitfast.runtime.device import cpu_signature

THUMBNAIL = 220
"""Pixels that the longer side of the timed photograph has."""
WIDTH = 480
"""Pixels that other pictures are wide, unless the page names another width."""


@dataclass
class Report:
    """What the page shows. A section is None where it was not asked for, and a text where it
    failed: the reason.

    Args:
        machine: what `vitfast.bench.machine.describe` gives.
        photo: what the models were timed on.
        pretrained: whether the weights are trained.
        created: date and time.
        command: as it was typed.
    """

    outcomes: Sequence[Outcome]
    machine: dict[str, Any]
    photo: Photograph | None
    pretrained: bool
    created: str
    command: str
    failures: Sequence[Failure] = ()
    large: Large | str | None = None
    attention: Attention | str | None = None
    duplicates: Duplicates | str | None = None


@dataclass
class Notes:
    """Reasons for what a table lacks, each once, numbered from 1."""

    reasons: list[str] = field(default_factory=list)

    def missing(self, reason: str) -> Markup:
        """The cell of what is not there, with the number of its reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return Markup(f"{MISSING}<sup>{self.reasons.index(reason) + 1}</sup>")


def render(report: Report) -> str:
    """The whole page; every text in it is escaped."""
    versions = report.machine["versions"]
    photo = report.photo
    notes, large_notes = Notes(), Notes()

    def spread(outcome: Outcome, quartiles: tuple[float, float] | None) -> str:
        if quartiles is None:
            return notes.missing(f"{outcome.title}: one round has no spread")
        return f"{milliseconds(quartiles[0])} to {milliseconds(quartiles[1])}"

    def memory(outcome: Outcome, peak: float | None) -> str:
        if peak is None:
            return notes.missing(f"{outcome.title}: {outcome.memory_reason}")
        return f"{peak:.0f} MB"

    def agreement(outcome: Outcome) -> str:
        if outcome.agreement is None:
            return notes.missing(f"{outcome.title} gives features, no classes")
        return f"{outcome.agreement} of 5"

    def way_time(way: Way) -> str:
        if way.median is None:
            return large_notes.missing(f"{way.name}: {way.reason}")
        text = escape(f"{digits(way.median)} s")
        if len(way.seconds) == 1:
            return Markup(f"{text}<small>one call</small>")
        low, high = min(way.seconds), max(way.seconds)
        of = f"{digits(low)} s to {digits(high)} s in {len(way.seconds)} calls"
        return Markup(f"{text}<small>{of}</small>")

    def way_memory(way: Way) -> str:
        if way.peak_mb is None:
            return large_notes.missing(f"{way.name}: {way.peak_reason}")
        return f"{way.peak_mb:.0f} MB"

    def way_apart(way: Way) -> str:
        if way.apart is None:
            return large_notes.missing(f"{way.name}: {way.apart_reason}")
        return share(way.apart)

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.globals |= {
        "ms": milliseconds, "digits": digits, "spread": spread, "memory": memory,
        "agreement": agreement, "way_time": way_time, "way_memory": way_memory,
        "way_apart": way_apart, "picture": picture, "time_bars": time_bars,
        "memory_bars": memory_bars,
    }  # fmt: skip
    return environment.from_string(PAGE).render(
        outcomes=report.outcomes,
        failures=report.failures,
        verdict=verdict(report.outcomes, report.failures),
        notes=notes,
        large_notes=large_notes,
        large=report.large,
        attention=report.attention,
        duplicates=report.duplicates,
        photo=None if photo is None else picture(photo.image, 0, THUMBNAIL),
        credit="" if photo is None else photo.credit,
        where=where(report.machine),
        versions=", ".join(f"{n} {versions[n]}" for n in ("vitfast", "torch", "timm")),
        weights="pretrained weights" if report.pretrained else "random weights, seeded",
        created=report.created,
        command=report.command,
    )


def where(machine: dict[str, Any]) -> str:
    """The machine in words: its name and threads, what the processor calls itself to programs, and
    the instruction set that kernels use."""
    parts = [machine["name"]]
    if not str(machine.get("device", "cpu")).startswith("cuda"):
        parts += [cpu_signature() or "family and model unknown to this system"]
        parts += [f"kernels for {machine['isa']}"] if machine.get("isa") else []
    return "; ".join(parts)


def time_bars(outcome: Outcome) -> list[tuple[str, float, str]]:
    """(who, per cent of the longer time, time) of both contenders."""
    times = {"timm": outcome.timm_ms, "vitfast": outcome.vitfast_ms}
    longest = max(times.values())
    return [(who, 100 * ms / longest, milliseconds(ms)) for who, ms in times.items()]


def memory_bars(outcome: Outcome) -> list[tuple[str, float, str]]:
    """(who, per cent of the larger peak, peak) of both contenders; no bar where a peak is unknown:
    the table says why."""
    peaks = {"timm": outcome.timm_mb, "vitfast": outcome.vitfast_mb}
    largest = max([mb for mb in peaks.values() if mb is not None], default=0.0)
    return [
        (who, 0.0, "unknown") if mb is None
        else (who, 100 * mb / largest if largest else 0.0, f"{mb:.0f} MB")
        for who, mb in peaks.items()
    ]  # fmt: skip


def picture(image: Image.Image, enlarge_to: int = 0, fit: int = WIDTH) -> str:
    """A small JPEG as a data URI; no more than `fit` pixels a side.

    Args:
        enlarge_to: pixels in width that a picture of few cells is brought to instead, cells staying
            squares.
    """
    if enlarge_to:
        factor = max(1, enlarge_to // image.width)
        small = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    else:
        small = image.copy()
        small.thumbnail((fit, fit))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
