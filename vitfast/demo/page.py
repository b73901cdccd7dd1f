"""The demo's report as one HTML page that loads nothing from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jinja2
from markupsafe import Markup
from PIL.Image import Image

from vitfast.bench.report import MISSING, digits, megabytes, milliseconds
from vitfast.demo.showcase import Outcome

GREY, GREEN, INK, MUTED = "#b9c0ca", "#1f8a5f", "#1d2733", "#66707c"
THUMBNAIL = (220, 220)
"""Pixels (width, height) that the photograph fits into."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitfast demo</title>
<style>
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1d2733;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0; }
.muted { color: #66707c; font-size: .875rem; }
.head { display: flex; gap: 1.5rem; align-items: flex-start; justify-content: space-between; }
.head img { border-radius: 6px; max-width: 9rem; height: auto; }
.chart svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .75rem .45rem 0; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e6e9ed; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #66707c; }
th:first-child, td:first-child { text-align: left; }
.good { color: #1f8a5f; font-weight: 600; }
.bad { color: #b3261e; font-weight: 600; }
details { border-bottom: 1px solid #e6e9ed; padding: .45rem 0; }
summary { cursor: pointer; }
pre { font-size: .8rem; overflow-x: auto; background: #f6f7f9; padding: .75rem; }
</style>
</head>
<body>
<main>
<div class="head">
<div>
<h1>timm beside vitfast</h1>
<p>Same weights, same photograph, one process, taking turns.</p>
<p class="muted">{{ where }}</p>
<p class="muted">{{ versions }}; {{ weights }}</p>
</div>
{% if photo %}<img src="data:image/jpeg;base64,{{ photo }}" alt="{{ credit }}"
 title="{{ credit }}">{% endif %}
</div>

<h2>Time of one image, timm = 100 %</h2>
<div class="chart">{{ chart }}</div>

<h2>Numbers</h2>
<div class="scroll"><table>
<tr><th>model</th><th>dtype</th><th>timm</th><th>vitfast</th><th>faster</th>
<th>MB timm</th><th>MB vitfast</th><th>error / budget</th><th>top-5</th></tr>
{% for o in outcomes %}<tr>
<td>{{ o.title }}</td><td>{{ o.dtype }}</td>
<td>{{ ms(o.timm_ms) }}</td><td>{{ ms(o.vitfast_ms) }}</td>
<td class="{{ 'good' if o.ratio >= 1 else 'bad' }}">{{ digits(o.ratio) }}x</td>
<td>{{ mb(o.timm_mb) }}</td><td>{{ mb(o.vitfast_mb) }}</td>
<td class="{{ 'good' if o.within_budget else 'bad' }}">
{{ "%.1e"|format(o.error) }} / {{ "%.1e"|format(o.budget) }}</td>
<td>{{ missing if o.agreement is none else "%d of 5"|format(o.agreement) }}</td>
</tr>{% endfor %}
</table></div>
<p class="muted">Medians of interleaved runs. Memory: the peak of the first run beyond the weights
that both share; vitfast's includes its prepacked copy of them.</p>
{% for o in outcomes %}<p class="muted">{{ o.title }}:
{{ o.rounds }} {{ "round" if o.rounds == 1 else "rounds" }};
budget: {{ o.budget_from }}.</p>{% endfor %}

{% for o in outcomes if o.labels %}{% if loop.first %}<h2>What the models see</h2>{% endif %}
<p>{{ o.title }}: {% for label, chance in o.labels %}{{ label }}
<span class="muted">{{ "%.0f"|format(100 * chance) }} %</span>{{ "" if loop.last else ", " }}
{% endfor %}</p>{% endfor %}

<h2>What was swapped</h2>
{% for o in outcomes %}<details><summary>{{ o.title }}: {{ o.swapped_classes() }}</summary>
<pre>{{ o.report }}</pre></details>{% endfor %}
</main>
</body>
</html>
"""


def render(
    outcomes: Sequence[Outcome],
    machine: dict[str, Any],
    photo: Image | None,
    credit: str,
    pretrained: bool,
) -> str:
    """The whole page; every text in it is escaped.

    Args:
        machine: what `vitfast.bench.machine.describe` gives.
        photo: the photograph, None for a page without one; `credit` says where it is from.
        pretrained: whether the weights are trained, which the page says.
    """
    versions = machine["versions"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.globals |= {
        "ms": milliseconds, "mb": megabytes, "digits": digits, "missing": MISSING,
    }  # fmt: skip
    return environment.from_string(_PAGE).render(
        outcomes=outcomes,
        chart=Markup(chart(outcomes)),  # made here, texts escaped
        photo=None if photo is None else _thumbnail(photo),
        credit=credit,
        where=machine["name"],
        versions=", ".join(f"{n} {versions[n]}" for n in ("vitfast", "torch", "timm")),
        weights="pretrained weights" if pretrained else "random weights, seeded",
    )


def chart(outcomes: Sequence[Outcome]) -> str:
    """Times as an <svg> element: two bars a model, timm's always as long as 100 %."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 + 0.8 * len(outcomes)))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.28, 0.02, 0.72, 0.96))
    style: dict[str, Any] = {"va": "center", "fontsize": 10, "parse_math": False}
    for i, outcome in enumerate(outcomes):
        share = 100 * outcome.vitfast_ms / outcome.timm_ms
        axes.barh(i - 0.19, 100, height=0.34, color=GREY)
        axes.barh(i + 0.19, share, height=0.34, color=GREEN)
        axes.text(101, i - 0.19, f"timm {milliseconds(outcome.timm_ms)}", color=MUTED, **style)
        label = f"vitfast {milliseconds(outcome.vitfast_ms)}, {digits(outcome.ratio)}x"
        axes.text(share + 1, i + 0.19, label, color=GREEN, weight="bold", **style)
        axes.text(-2, i, outcome.title, ha="right", color=INK, **style)
    axes.set_ylim(len(outcomes) - 0.5, -0.5)
    longest = max([100.0, *(100 * o.vitfast_ms / o.timm_ms for o in outcomes)])
    axes.set_xlim(0, 1.4 * longest)  # the labels stand right of the bars
    axes.axis("off")
    buffer = io.StringIO()
    with _svg_text():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _svg_text() -> AbstractContextManager[None]:
    """Within, letters stay text, in the reader's font, and ids are the same in every run."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitfast",
                                  "font.family": "sans-serif"})  # fmt: skip


def _thumbnail(photo: Image) -> str:
    """A small JPEG of the photograph, in base64."""
    small = photo.copy()
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
