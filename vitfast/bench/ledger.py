"""benchmarks/KERNELS.md: which kernels were compiled for which GPU, which have run, and how fast.

    python -m vitfast.bench.ledger            # write benchmarks/KERNELS.md anew
    python -m vitfast.bench.ledger --check    # exit status 1 if it is not current

It is made from `tests/gpu/resources.json`, the launch tables and the records under
`benchmarks/results`, so the current folder has to be a checkout.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from vitfast import ops
from vitfast.runtime import launches
from vitfast.runtime.launches import TARGETS, Arch
from vitfast.testing import aot

PAGE = Path("benchmarks", "KERNELS.md")
RESULTS = Path("benchmarks", "results")
CARDS = {
    "sm_75": "T4, RTX 20", "sm_80": "A100", "sm_86": "A10, RTX 30", "sm_89": "L4, L40, RTX 40",
    "sm_90": "H100, H200", "sm_100": "B200", "sm_120": "RTX 50", "gfx90a": "MI200",
    "gfx942": "MI300", "gfx950": "MI350", "gfx1100": "RX 7900", "gfx1201": "RX 9070",
}  # fmt: skip
HEAD = """\
# Kernels by device

Made by `python -m vitfast.bench.ledger` from the resource table, the launch tables and the records
in [results](results); a test fails when it is out of date. How the figures were taken:
[README](README.md).
"""
TRITON = """\
Every kernel x config x dtype is compiled ahead of time by Triton {version}, but for those that have
changed since, and runs in Triton's interpreter against float64, forward and backward. *Not run*
means: on no such GPU. There a kernel runs when it is asked for by name (`backend="triton"`), and
`backend="auto"` takes the vendor's kernels until a self-test has seen it right on that machine. The
number is that of compiled variants.
"""
WITHOUT_DOT = """\
¹ Triton has no matrix instructions for this GPU: kernels that multiply matrices refuse it, and
torch's own (SDPA, cuBLAS, cuDNN) run.
"""
RESOURCES = """\
What the largest kernels take, of those that are compiled as they are now. On sm_80 and newer,
gfx942 and gfx950 none may spill more than four registers, nor any in a loop, and all fit the shared
memory that one block may use there.
"""


def page(checkout: Path) -> str:
    """The text of the whole page."""
    known = json.loads((checkout / aot.TABLE).read_text())
    records = list(_records(checkout / RESULTS))
    parts = [HEAD, "## Triton kernels\n", TRITON.format(version=known["triton"])]
    parts += [_by_target(known["kernels"], known.get("pending", {}), records), WITHOUT_DOT]
    parts += ["## Registers and shared memory\n", RESOURCES, _resources(known["kernels"])]
    for device in sorted({record["folder"] for record in records}):
        mine = [record for record in records if record["folder"] == device]
        parts += [f"## Measured: {device}\n", *_measured(mine)]
    return "\n".join(parts)


def _records(results: Path) -> Iterator[dict[str, Any]]:
    """Every record, with the name of its folder; launch tables, which lie there too, are none."""
    for path in sorted(results.glob("*/*.json")):
        found = json.loads(path.read_text())
        if "kind" in found:
            yield {**found, "folder": path.parent.name}


def _of(records: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those that one command wrote, "check", "prove" or "bench"."""
    return [r for r in records if r["kind"] == f"vitfast {kind}"]


def _when(record: dict[str, Any]) -> str:
    """Date and commit."""
    return f"{record['created'][:10]}, {record['machine']['commit']}"


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return tabulate(rows, list(header), "pipe", disable_numparse=True) + "\n"


def _by_target(
    kernels: dict[str, dict[str, Any]], pending: dict[str, list[str]],
    records: list[dict[str, Any]],
) -> str:  # fmt: skip
    """One line a GPU architecture, one column an op with Triton kernels."""
    names = list(aot.modules())
    proven = {r["machine"].get("arch"): r for r in _of(records, "prove")}
    rows = [["interpreter", "any CPU", *("fp16, fp32, fp64" for _ in names)]]
    for target in TARGETS:
        cells = []
        for name in names:
            count = sum(kernel.startswith(f"{name}/") for kernel in kernels[target])
            if name in pending.get(target, ()):
                cells.append("changed, not compiled anew")
            else:
                cells.append(_state(target, name, count, proven.get(target)) if count else "none ¹")
        rows.append([target, CARDS[target], *cells])
    return _markdown(("GPU", "such as", *names), rows)


def _state(target: str, op: str, count: int, record: dict[str, Any] | None) -> str:
    """How far an op is on one architecture, of which `record` is the latest `vitfast prove`.

    Args:
        count: compiled variants of its kernels.
    """
    mine = [i for i in (record["items"] if record else ()) if i["op"] == op and "state" in i]
    states = {item["state"] for item in mine} - {"refused", "no memory"}
    if record is None or not states:
        return f"compiled, not run ({count})"
    if states != {"right"}:
        return f"{min(states - {'right'})} ({_when(record)})"
    carried = launches.packaged(target).get("verdicts", {}).get("ops", {})
    return f"{'picked' if op in carried else 'run'} ({_when(record)})"


def _resources(kernels: dict[str, dict[str, Any]]) -> str:
    """One line an architecture: the largest of what any kernel takes there."""
    rows = []
    for target, entries in kernels.items():
        found = list(entries.values())
        if not found:  # all of them are pending
            continue
        spilling = [e["spilled"] for e in found if e["spilled"]]
        worst = max(e["shared"] for e in found)
        rows.append([
            target, str(len(found)), str(max(e["registers"] for e in found)),
            f"{len(spilling)}, {max(spilling)} bytes at most" if spilling else "none",
            f"{worst / 1024:.0f} of {Arch(target).shared_bytes / 1024:.0f} KiB",
            str(sum(e["matrix"] > 0 for e in found)),
        ])  # fmt: skip
    header = (
        "GPU", "kernels", "registers", "kernels that spill", "shared memory",
        "kernels with matrix instructions",
    )  # fmt: skip
    return _markdown(header, rows)


def _measured(records: list[dict[str, Any]]) -> Iterator[str]:
    """The section of one machine: errors, then speeds of ops, of blocks and models."""
    for record in _of(records, "check"):
        yield f"`vitfast check`, {_when(record)}: worst error over budget, 1 is the limit.\n"
        yield _errors(record["findings"])
    for record in _of(records, "prove"):
        yield f"`vitfast prove`, {_when(record)}: worst error over budget, 1 is the limit.\n"
        yield _errors([_as_finding(i) for i in record["items"] if i["stage"] == "selftest"])
    timed = _of(records, "bench")
    for title, table in (("Ops", _op_speeds(timed)), ("Blocks and models", _model_speeds(timed))):
        if table:
            yield f"{title}, times faster than each peer:\n"
            yield table


def _as_finding(item: dict[str, Any]) -> dict[str, Any]:
    """An item of a self-test in the terms of `vitfast check`."""
    state = {"right": "ok", "refused": "cannot run", "no memory": "cannot run"}
    return {
        "level": "op", "name": item["op"], "backend": "triton", "dtype": item["dtype"],
        "state": state.get(item["state"], "wrong"),
        "error_over_budget": item.get("error_over_budget"),
    }  # fmt: skip


def _errors(findings: list[dict[str, Any]]) -> str:
    """One line an op and backend."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for f in findings:
        if f["level"] == "op" and f["state"] != "cannot run":
            lines.setdefault((f["name"], f["backend"]), []).append(f)
    dtypes = sorted({f["dtype"] for mine in lines.values() for f in mine}, reverse=True)
    rows = [
        [op, backend, str(len(mine)), *(_worst(mine, dtype) for dtype in dtypes),
         "wrong" if any(f["state"] == "wrong" for f in mine) else "ok"]
        for (op, backend), mine in lines.items()
    ]  # fmt: skip
    return _markdown(("op", "backend", "cases", *dtypes, "state"), rows)


def _worst(findings: list[dict[str, Any]], dtype: str) -> str:
    """The largest error over budget in one dtype."""
    errors = [f["error_over_budget"] for f in findings if f["dtype"] == dtype]
    errors = [math.inf if e is None else e for e in errors]
    return f"{max(errors):.2f}" if errors else "-"


def _op_speeds(records: list[dict[str, Any]]) -> str:
    """One line an op, dtype and pass: geometric means over the cases."""
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        for row in record["rows"]:
            if row["level"] == "ops":
                op = row["case"].split()[0]
                group = (op, row["backend"], row["dtype"], row["passes"], _when(record))
                lines.setdefault(group, []).append(row)
    names = _peers(row for rows in lines.values() for row in rows)
    order = {name: i for i, name in enumerate(ops.NAMES)}
    rows = []
    for key in sorted(lines, key=lambda k: (order.get(k[0], len(order)), k[2:4], k[1])):
        found = lines[key]
        shares = [row["floor_share"] for row in found if row["floor_share"]]
        share = f"{100 * statistics.median(shares):.0f}%" if shares else "-"
        means = (_mean([r["ratios"][n] for r in found if n in r["ratios"]]) for n in names)
        rows.append([*key[:4], str(len(found)), *means, share, key[4]])
    header = ("op", "backend", "dtype", "pass", "cases", *names, "of floor", "when")
    return _markdown(header, rows) if rows else ""


def _model_speeds(records: list[dict[str, Any]]) -> str:
    """One line a row of a block or model."""
    found = [(r, row) for r in records for row in r["rows"] if row["level"] != "ops"]
    names = _peers(row for _, row in found)
    rows = [
        [row["level"], row["case"], row["shape"], row["dtype"], row["passes"],
         *(_mean([row["ratios"][n]] if n in row["ratios"] else []) for n in names),
         f"{100 * row['floor_share']:.0f}%" if row["floor_share"] else "-", _when(record)]
        for record, row in found
    ]  # fmt: skip
    header = ("level", "model", "shape", "dtype", "pass", *names, "of floor", "when")
    return _markdown(header, rows) if rows else ""


def _peers(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The peers that any of these rows has a ratio to."""
    return list(dict.fromkeys(name for row in rows for name in row["ratios"]))


def _mean(ratios: list[float]) -> str:
    """The geometric mean, as in "1.52x"."""
    return f"{statistics.geometric_mean(ratios):.2f}x" if ratios else "-"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)
    text = page(Path())
    if not args.check:
        PAGE.write_text(text)
        return 0
    current = PAGE.exists() and PAGE.read_text() == text
    print("current" if current else f"out of date: run python -m {__spec__.name}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
