"""`vitfast swap`: what swapping a timm model would do. Nothing is run, no weights are made."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitfast.report import Swapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm model name")
    add("--img-size", metavar="HxW", help="such as 224 or 2160x3840; the model's own by default")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--json", metavar="FILE", help="write the report too")


def run(args: argparse.Namespace) -> int:
    from vitfast.bench import record, zoo
    from vitfast.swap import swap

    size = None if args.img_size is None else zoo.parse_img_size(args.img_size)
    if args.json:
        record.check_writable(args.json)
    report = swap(zoo.build(args.model, size, device="meta"))
    report.swapped = [replace(e, note=_distrust(e, args.device) or e.note) for e in report.swapped]
    print(report)
    if args.json:
        record.write_text(args.json, report.to_json() + "\n")
    return 0


def _distrust(entry: Swapped, device: str | None) -> str:
    """The note of a layer that would be left to timm on the device, in float32."""
    import torch

    import vitfast
    from vitfast.report import AS_TIMM, UNTRUSTED
    from vitfast.runtime.trust import untrusted

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = reduce(getattr, entry.layer_class.split(".")[1:], vitfast).ops
    why = "" if entry.note.startswith(AS_TIMM) else untrusted(ops, torch.empty(0, device=device))
    return f"{UNTRUSTED}{why}" if why else ""
