"""`vitfast info`: what this machine has, and for every op and backend yes, or why not."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

_NOT_WRITTEN = "this op has no such backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0


def collect() -> dict[str, Any]:
    """Everything `vitfast info` knows, as JSON-ready values.

    `ops` maps op -> backend -> reasons against; an empty list means that the backend can run.
    """
    import vitfast
    from vitfast.ops import specs
    from vitfast.runtime import device
    from vitfast.settings import BACKENDS, ENVIRONMENT, settings

    found = device.versions()
    found["vitfast"] = vitfast.__version__  # also where it is used without being installed
    ops = {}
    for spec in specs():
        backends = spec.dispatcher.backends
        ops[spec.name] = {
            name: list(backends[name].available()) if name in backends else [_NOT_WRITTEN]
            for name in BACKENDS[1:]
        }
    return {
        "versions": found,
        "machine": {"python": sys.executable, **device.machine()},
        "location": vitfast.__path__[0],
        "native": native_facts(),
        "cuda": cuda_reasons(),
        "trust": trust_facts(),
        "settings": {
            name: {
                "value": getattr(settings, name),
                "source": settings.source[name],
                "variable": variable,
            }
            for name, variable in ENVIRONMENT.items()
        },
        "ops": ops,
    }


def cuda_reasons() -> list[str]:
    """Why the kernels of csrc/cuda could never run here; empty when they can."""
    from vitfast.runtime import cuda

    return cuda.available()


def native_facts() -> dict[str, Any]:
    """State of the compiled extension: `usable`, the reasons against, and how it was built."""
    from vitfast.errors import VitfastError
    from vitfast.runtime import native
    from vitfast.settings import ISA_LEVELS

    facts: dict[str, Any] = {"usable": False, "reasons": native.reasons()}
    try:
        from vitfast._build_info import COMPILER

        facts["compiler"] = COMPILER
    except ImportError:
        facts["compiler"] = None
    if facts["reasons"]:
        return facts
    try:
        module = native.native()
    except VitfastError as error:
        facts["reasons"] = [str(error)]
        return facts
    facts |= module.build_info()
    facts |= {"usable": True, "isa": native.isa(), "best_isa": ISA_LEVELS[module.best_isa()]}
    return facts


def trust_facts() -> dict[str, dict[str, str]]:
    """Of each GPU, "op dtype pass" -> the state of its kernels' verdict, with the reason."""
    import torch

    from vitfast.runtime import verdicts

    found = {}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        found[str(device)] = {
            " ".join(question): f"{verdict.state} {verdict.reason}".strip()
            for question, verdict in verdicts.known(device).items()
        }
    return found


def show(facts: dict[str, Any]) -> None:
    """Print `collect()`'s facts for people."""
    from vitfast.cli.table import print_table

    if facts["settings"]["disable"]["value"]:
        print("vitfast is disabled: swapped layers run timm's forward, ops their reference\n")
    machine = {**facts["machine"], "gpus": ", ".join(facts["machine"]["gpus"]) or "none"}
    print_table(
        "Versions", ("package", "version"),
        [(name, version or "not installed") for name, version in facts["versions"].items()],
    )  # fmt: skip
    print_table("Machine", ("", ""), [*machine.items(), ("vitfast is in", facts["location"])])
    native = facts["native"]
    rows = [("state", "ready" if native["usable"] else "; ".join(native["reasons"]))]
    if native["usable"]:
        rows += [
            ("instruction set", f"{native['isa']} (best here: {native['best_isa']})"),
            ("built for", ", ".join(native["isas"])),
            ("OpenMP", "yes" if native["openmp"] else "none: kernels run on one thread"),
        ]
    rows.append(("compiler", native["compiler"] or "unknown"))
    print_table("Native extension", ("", ""), rows)
    why = "; ".join(facts["cuda"]) or "compiled at their first use"
    print_table("CUDA kernels", ("", ""), [("state", why), ("picked", "by backend='cuda' alone")])
    print_table(
        "Settings", ("setting", "value", "from", "variable"),
        [(n, s["value"], s["source"], s["variable"]) for n, s in facts["settings"].items()],
    )  # fmt: skip
    for device, states in facts["trust"].items():
        rows = [*states.items()] or [("none", "vitfast.prepare(model, sample) tests them")]
        print_table(f"Kernels on {device}", ("op, dtype, pass", "verdict"), rows)
    show_ops(facts["ops"], print_table)


def show_ops(ops: dict[str, dict[str, list[str]]], print_table: Any) -> None:
    """The op x backend table: yes, or the numbers of the reasons listed under it."""
    notes: dict[str, int] = {}
    rows = []
    for op, backends in ops.items():
        cells = []
        for reasons in backends.values():
            numbers = [str(notes.setdefault(reason, len(notes) + 1)) for reason in reasons]
            cells.append(f"no ({', '.join(numbers)})" if numbers else "yes")
        rows.append((op, *cells))
    print_table("Ops", ("op", *next(iter(ops.values()))), rows)
    if notes:
        print_table("Why not", ("", "reason"), [(f"({n})", text) for text, n in notes.items()])
