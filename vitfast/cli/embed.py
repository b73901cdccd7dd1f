"""`vitfast embed`: a folder of images to a folder of Parquet files."""

from __future__ import annotations

import argparse
import ast
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfast.errors import InputValueError

if TYPE_CHECKING:
    from vitfast.embedding import Embedder, Written

LISTED = 10
"""Broken files that are named on the screen; all of them are in errors.jsonl."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of images")
    add("--model", metavar="NAME", required=True, help="a timm model name")
    add("--out", metavar="DIR", required=True, help="folder of shards; a run that was stopped "
        "goes on where it was")  # fmt: skip
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--pretrained", action="store_true", help="timm's weights (from the network or cache)"
    )
    weights.add_argument("--checkpoint", metavar="FILE", help="weights from a .pth or .safetensors")
    add("--img-size", metavar="HxW", help="such as 224; the model's own by default")
    add("--model-kwargs", metavar="KEY=VALUE", nargs="+", default=[],
        help="for timm.create_model")  # fmt: skip
    add("--pool", choices=("token", "avg"), help="what the model's own head reads by default")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the vectors")
    add("--no-normalize", action="store_true", help="leave vectors their length")
    add("--batch-size", type=int, default=32, metavar="N", help="images a forward; 32 by default")
    add("--workers", type=int, metavar="N", help="threads that decode; one a core, 8 at most")
    add("--shard-rows", type=int, default=8192, metavar="N", help="vectors a file; 8192 by default")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; cuda where there is one")
    add("--no-swap", action="store_true", help="timm's own layers")
    add("--recursive", action=argparse.BooleanOptionalAction, default=True,
        help="folders below as well, which is the default")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from vitfast.bench import zoo
    from vitfast.bench.progress import progress_bar
    from vitfast.embedding import find_images
    from vitfast.embedding.shards import parquet
    from vitfast.settings import torchrun

    rank, world, local = torchrun()
    parquet()
    images = find_images(args.folder, recursive=args.recursive)
    if not images:
        hint = "" if args.recursive else "; --recursive looks below as well"
        raise InputValueError(f"{args.folder}: no image in it{hint}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputValueError(f"--out {args.out} is a file; name a folder")
    kwargs = model_kwargs(args.model_kwargs)
    if args.img_size:
        kwargs["img_size"] = zoo.parse_img_size(args.img_size)
    embedder = build(args, kwargs, local if world > 1 else None)
    who = f"rank {rank} of {world}: " if world > 1 else ""
    if embedder.source["from"] == "random" and rank == 0:
        print(
            f"vitfast: the weights of {args.model} are random (seed {embedder.source['seed']}): "
            "--pretrained or --checkpoint FILE loads trained ones",
            file=sys.stderr,
        )
    share = len(range(rank, len(images), world))
    with progress_bar(share) as show, warnings.catch_warnings():
        from PIL import Image

        # Said in the list of broken files instead.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        done = embedder.write(
            images,
            args.out,
            shard_rows=args.shard_rows,
            progress=lambda good, bad, there: show(
                f"{good} embedded, {bad} broken", float(good + bad + there)
            ),
        )
    say(done, args.out, who)
    return int(bool(done.errors) and done.embedded + done.present == 0)


def build(args: argparse.Namespace, kwargs: dict[str, Any], local: int | None) -> Embedder:
    """The embedder that the arguments describe; each rank of a machine has its own GPU."""
    import torch

    from vitfast.embedding import Embedder

    device = args.device
    if device in (None, "cuda") and local is not None and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    return Embedder(
        args.model,
        pool=args.pool,
        dtype=args.dtype,
        normalize=not args.no_normalize,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_kwargs=kwargs,
        swap=not args.no_swap,
    )


def model_kwargs(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE words; a value is a Python literal, or else a string.

    Raises:
        InputValueError: a word of another form.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputValueError(f"--model-kwargs {word}: expected KEY=VALUE")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def say(done: Written, out: str, who: str) -> None:
    """The counts, and the broken files by name."""
    from vitfast.cli.table import print_table, print_text

    if done.errors:
        rows = list(done.errors.items())
        more = f"; the first {LISTED}, all in errors*.jsonl" if len(rows) > LISTED else ""
        print_table(f"{who}Not embedded: {len(rows)}{more}", ("id", "why"), rows[:LISTED])
    rate = f", {done.embedded / done.seconds:.1f} images/s" if done.embedded else ""
    before = f", {done.present} were there" if done.present else ""
    broken = f", {len(done.errors)} broken" if done.errors else ""
    print_text(f"{who}{done.embedded} embedded{before}{broken}{rate}: {out}")
