"""`vitfast swap`: what swapping a timm model would do. Nothing is run, no weights are made."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm model name")
    add("--img-size", metavar="HxW", help="such as 224 or 2160x3840; the model's own by default")
    add("--json", metavar="FILE", help="write the report too")


def run(args: argparse.Namespace) -> int:
    from vitfast.bench import record, zoo
    from vitfast.swap import swap

    size = None if args.img_size is None else zoo.parse_img_size(args.img_size)
    if args.json:
        record.check_writable(args.json)
    report = swap(zoo.build(args.model, size, device="meta"))
    print(report)
    if args.json:
        record.write_text(args.json, report.to_json() + "\n")
    return 0
