"""`vitfast swap`: what swapping a timm model would do. Nothing is run, no weights are made."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import reduce
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm model name")
    add("--img-size", metavar="HxW", help="such as 224 or 2160x3840; the model's own by default")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--json", metavar="FILE", help="write the report too")


def run(args: argparse.Namespace) -> int:
    import torch

    import vitfast
    from vitfast.bench import record, zoo
    from vitfast.report import AS_TIMM
    from vitfast.swap import note_of_distrust, swap

    size = None if args.img_size is None else zoo.parse_img_size(args.img_size)
    if args.json:
        record.check_writable(args.json)
    report = swap(zoo.build(args.model, size, device="meta"))
    # The model lies on no device: what counts is where it would be run, in float32.
    like = torch.empty(0, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for i, entry in enumerate(report.swapped):
        layer: Any = reduce(getattr, entry.layer_class.split(".")[1:], vitfast)
        if not entry.note.startswith(AS_TIMM):
            note = note_of_distrust(layer, like) or entry.note
            report.swapped[i] = replace(entry, note=note)
    print(report)
    if args.json:
        record.write_text(args.json, report.to_json() + "\n")
    return 0
