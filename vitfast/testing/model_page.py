"""benchmarks/results/model/KERNELS.md: what bounds each Triton kernel, by the model of `model`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitfast.testing.model import BATCH, DEVICES, DTYPE, Line, lines

HEAD = """\
# Kernels by a model

Made by `python -m vitfast.testing.aot --model > benchmarks/results/model/KERNELS.md`. **A model, no
timings**: no kernel was run. For each kernel that the ops' real samples launch, in {dtype} at batch
{batch}, its machine code was read and a few of its blocks followed through all loops; the bound is
the time that the busiest part of the multiprocessors (or DRAM, each tensor once) needs for these
instructions. The floor is the larger of the tensors' bytes at DRAM's bandwidth and the operations
at the device's peak: a forward's by its spec, another kernel's by its matrix instructions. A kernel
can be slower than its bound, by latencies that the model does not know, and not faster. What is
above twice its floor spends instructions that another would not. A compiled kernel has one line, at
the first real sample that launches it.

Limits: `issue`, instructions of all kinds, 4 a cycle; `fma`, `alu` (integers, comparisons,
selections, conversions), `xu` (exponentials, reciprocals), `lsu` (memory instructions, shuffles),
`shared` (its banks), `tensor`, `L2` (sectors, 64 bytes a cycle) and `DRAM`. Occupancy is the share
of a multiprocessor's warps; columns of counts are of one block's warp.
"""
ABOVE = 2.0


def page(targets: Sequence[str], names: set[str] | None = None) -> str:
    """The whole page as Markdown; says on stderr how far it is."""
    parts = [HEAD.format(dtype=str(DTYPE).removeprefix("torch."), batch=BATCH)]
    for target in targets:
        found = []
        for made in lines(target, names):
            found.append(made)
            print(target, made.op, made.sample, made.which, made.launch.name, file=sys.stderr)
        devices = [d.name for d in DEVICES if d.target == target]
        parts += [f"## {target}: {', '.join(devices)}\n", _table(found, devices)]
        worst = sorted(found, key=lambda f: -f.bounds[devices[0]].over)
        above = [f for f in worst if f.bounds[devices[0]].over > ABOVE]
        parts += [
            f"Above {ABOVE:.0f} times the floor on {devices[0]}: {len(above)} of {len(found)}.\n"
        ]
        parts += [_above(above, devices[0])] if above else []
    return "\n".join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    made = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in made) + "\n"


def _table(found: Sequence[Line], devices: Sequence[str]) -> str:
    header = ["op", "sample", "pass", "kernel", "blocks x warps", "registers", "occupancy"]
    for name in devices:
        header += [f"{name}: bound, us", "floor, us", "over", "limit"]
    header += ["instructions", "tensor, fma, alu, xu, lsu", "barriers", "loops"]
    rows = []
    for f in found:
        row = [f.op, f.sample, f.which, f.launch.name, f"{f.launch.programs} x {f.work.warps}",
               str(f.work.registers), f"{f.bounds[devices[0]].occupancy:.0%}"]  # fmt: skip
        for name in devices:
            b = f.bounds[name]
            row += [f"{b.bound:.1f}", f"{b.floor:.1f}", f"{b.over:.2f}", b.limit]
        each = {k: n / f.work.warps for k, n in f.work.pipes.items()}
        groups = (each["tensor"], each["fma"] + each["imad"], each["alu"], each["xu"], each["lsu"])
        row += [
            f"{f.work.instructions / f.work.warps:.0f}", ", ".join(f"{n:.0f}" for n in groups),
            f"{f.work.barriers:.0f}",
            ", ".join(f"{n} x {times:.1f}" for n, times in f.work.loops if times) or "-",
        ]  # fmt: skip
        rows.append(row)
    return _markdown(header, rows)


def _above(found: Sequence[Line], device: str) -> str:
    rows = [
        [
            f.op,
            f.sample,
            f.which,
            f.launch.name,
            f"{f.bounds[device].over:.2f}",
            f.bounds[device].limit,
        ]
        for f in found
    ]
    return _markdown(("op", "sample", "pass", "kernel", "over", "limit"), rows)
