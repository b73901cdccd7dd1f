"""What `vitfast check` found: one `Finding` a check, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

OK, WRONG, REFUSED = "ok", "wrong", "cannot run"
"""States of a finding; REFUSED is a backend that says why it cannot run a case, and no error."""

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""(header, lines); every line has as many cells as the header."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        level: "op" or "model".
        name, case: the op and its sample; the family and its model.
        dtype: the working dtype, such as "bfloat16".
        passes: "forward" or "backward".
        backend: a backend's name; for models "swap".
        state: `OK`, `WRONG`, or `REFUSED` where a backend refuses this case, or
            every block of a model is left to timm.
        error_over_budget: the worst of all outputs or gradients; 1 is the limit. None where nothing
            was compared.
        reason: what is wrong, or why it cannot run.
        picked: whether this backend is what backend="auto" takes here.
    """

    level: str
    name: str
    case: str
    dtype: str
    passes: str
    backend: str
    state: str
    error_over_budget: float | None = None
    reason: str = ""
    picked: bool = False


def op_table(found: Iterable[Finding]) -> Table:
    """One line an op and backend: the worst error over budget by dtype and pass."""
    ops = [f for f in found if f.level == "op"]
    return _table(ops, ("op", "backend"), lambda f: (f.name, f.backend), picked=True)


def model_table(found: Iterable[Finding]) -> Table:
    """One line a family: the worst error over budget by dtype and pass."""
    models = [f for f in found if f.level == "model"]
    return _table(models, ("family", "model"), lambda f: (f.name, f.case))


def _table(
    found: list[Finding],
    names: tuple[str, ...],
    key: Callable[[Finding], tuple[str, ...]],
    picked: bool = False,
) -> Table:
    """A line for each value of `key`, whose parts are called `names`.

    Args:
        picked: whether a last column says in how many of its cases backend="auto" takes a backend.
    """
    columns = list(dict.fromkeys((f.dtype, f.passes) for f in found))
    lines: list[tuple[str, ...]] = []
    for group in dict.fromkeys(map(key, found)):
        mine = [f for f in found if key(f) == group]
        ran = [f for f in mine if f.state != REFUSED]
        worst = [_worst(f for f in ran if (f.dtype, f.passes) == column) for column in columns]
        state = WRONG if any(f.state == WRONG for f in mine) else OK if ran else REFUSED
        count = sum(f.picked for f in mine)
        share = f"{count} of {len(mine)}" if count else ""
        lines.append((*group, *worst, state, *([share] if picked else [])))
    header = (*names, *(f"{dtype} {passes}" for dtype, passes in columns), "state")
    return (*header, "picked") if picked else header, lines


def _worst(found: Iterable[Finding]) -> str:
    """The largest error over budget; infinite where one ran and could not be compared."""
    errors = [math.inf if f.error_over_budget is None else f.error_over_budget for f in found]
    return f"{max(errors):.2f}" if errors else "-"


def as_json(found: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as a record keeps them."""
    return [vars(f) for f in found]
