"""`vitfast attend`: what a model attends to in a picture, laid over it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfast.cli.device import chosen_device
from vitfast.errors import InputValueError, first_line

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from vitfast.highres import AttentionMap

NATIVE = "native"
OUT = "attention.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="a picture")
    add("--model", metavar="NAME", required=True, help="a timm model")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--pretrained",
        action="store_true",
        help="trained weights (from the network or cache); else random ones",
    )
    weights.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights of the model at its own size, as torch or safetensors save them",
    )
    add("--layer", default="-1", metavar="N", help="a block, -1 (default) is the last; or pool")
    add("--head", default="mean", metavar="N", help="a head, or mean (default)")
    add(
        "--query",
        default="cls",
        metavar="WHAT",
        help="whose attention: cls (default), dist, "
        "registers, mean (over all patches), a token N, or a patch ROW,COLUMN",
    )
    add("--rollout", action="store_true", help="through all layers instead of in one")
    add(
        "--size",
        metavar="HxW",
        help="of the model's input, such as 224 or 1088x1920; or native, "
        "the picture's own; the model's by default",
    )
    add("--colormap", default="viridis", metavar="NAME", help="of matplotlib; viridis by default")
    add("--alpha", type=float, default=0.5, metavar="A", help="of the map: 0 to 1; 0.5 by default")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--out", default=OUT, metavar="FILE", help=f"the picture to write; {OUT} by default")


def run(args: argparse.Namespace) -> int:

    from vitfast.bench import zoo
    from vitfast.cli.table import print_text
    from vitfast.highres.attention.overlay import overlay
    from vitfast.highres.pictures import picture_input
    from vitfast.pictures import read_image
    from vitfast.swap import swap

    target = _check_target(args.out)
    colours = _colormap(args.colormap)
    if not 0 <= args.alpha <= 1:
        raise InputValueError(f"--alpha {args.alpha}: expected a number from 0 to 1")
    layer: Any = args.layer if args.layer == "pool" else _number("--layer", args.layer)
    head: Any = args.head if args.head == "mean" else _number("--head", args.head)
    if args.rollout and (args.layer, args.head) != ("-1", "mean"):
        raise InputValueError("--rollout goes through all layers and heads: no --layer, no --head")
    query = _query(args.query)
    zoo.check_name(args.model)
    device = chosen_device(args.device)
    picture = read_image(args.image)
    size = _size(args.size, args.model, picture)
    model = _build(args, size).to(device)
    if not args.pretrained and not args.checkpoint:
        print_text("weights are random: the map is none of a trained model (--pretrained is)")
    swap(model)
    image = picture_input(model, picture, size or _own_size(model))
    found = _look(model, image, layer, head, query, args.rollout)
    _write(target, overlay(picture, found, colours, args.alpha))
    print_text(_summary(args.model, image, found))
    print_text(f"overlay: {target}")
    return 0


def _check_target(out: str) -> Path:
    from PIL import Image

    from vitfast.bench import record

    target = record.check_writable(out)
    Image.init()
    if Image.EXTENSION.get(target.suffix.lower()) not in Image.SAVE:
        raise InputValueError(f"--out {target}: expected the name of a picture, such as {OUT}")
    return target


def _colormap(name: str) -> Any:
    import difflib

    from matplotlib import colormaps

    if name in colormaps:
        return colormaps[name]
    near = difflib.get_close_matches(name, list(colormaps), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ", such as viridis or magma"
    raise InputValueError(f"--colormap {name}: matplotlib has none of this name{hint}")


def _number(option: str, text: str) -> int:
    if re.fullmatch(r"-?\d{1,6}", text) is None:
        raise InputValueError(f"{option} {text}: expected a number")
    return int(text)


def _query(text: str) -> Any:
    """A query of `attention_map`: a word, an index, or (row, column)."""
    if text.isalpha():
        return text
    found = re.fullmatch(r"(\d{1,6})(?:,(\d{1,6}))?", text.replace(" ", ""))
    if found is None:
        raise InputValueError(f"--query {text}: expected a word, a token N or a patch ROW,COLUMN")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _size(text: str | None, name: str, picture: Image.Image) -> tuple[int, int] | None:
    """(H, W) of the model's input; None for the model's own."""
    from vitfast.bench import zoo

    if text is None:
        return None
    if text != NATIVE:
        try:
            return zoo.parse_img_size(text)
        except InputValueError:
            expected = "expected a size such as 224 or 1088x1920, or native"
            raise InputValueError(f"--size {text}: {expected}") from None
    # A picture is a whole number of patches at the nearest size that is one.
    rows, columns = _patch(zoo.build(name, device="meta"))
    width, height = picture.size
    return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns


def _patch(model: nn.Module) -> tuple[int, int]:
    for part in ("patch_embed", "embeds"):
        embed: Any = getattr(model, part, None)
        if hasattr(embed, "feat_ratio"):
            rows, columns = embed.feat_ratio(as_scalar=False)
            return int(rows), int(columns)
    return 1, 1


def _own_size(model: nn.Module) -> tuple[int, int]:
    from vitfast.highres.pictures import input_size

    return input_size(model)


def _build(args: argparse.Namespace, size: tuple[int, int] | None) -> nn.Module:
    from vitfast.bench import zoo
    from vitfast.loading import load_backbone

    if args.checkpoint is None:
        return zoo.build(args.model, size, pretrained=args.pretrained)
    # Its position embedding is of the model's own size, and resized from there.
    model: Any = zoo.build(args.model, num_classes=0)
    load_backbone(model, args.checkpoint)
    if size is None or size == _own_size(model):
        return model
    if not hasattr(model, "set_input_size"):
        raise InputValueError(f"--size: {args.model} with a checkpoint has its own size only")
    try:
        model.set_input_size(img_size=size)
    except zoo.UNFIT as error:
        raise InputValueError(f"--size {args.size}: {first_line(error)}") from error
    return model


def _look(
    model: nn.Module, image: torch.Tensor, layer: Any, head: Any, query: Any, rollout: bool
) -> AttentionMap:
    from vitfast.highres import attention_map, attention_rollout

    if rollout:
        return attention_rollout(model, image, query)
    return attention_map(model, image, layer, query, head)


def _summary(name: str, image: torch.Tensor, found: AttentionMap) -> str:
    patches = found.patches[0].mean((0, 1))
    rows, columns = patches.shape
    most = int(patches.flatten().argmax())
    where = found.layer if isinstance(found.layer, str) else f"layer {found.layer}"
    text = (
        f"{name} at {image.shape[-2]}x{image.shape[-1]}, {where}: {rows} x {columns} patches, "
        f"most attention ({float(patches.max()):.2%}) at {most // columns},{most % columns}"
    )
    if found.prefix.shape[-1]:
        text += f"; {float(found.prefix[0].sum(-1).mean()):.0%} goes to tokens before the patches"
    return text


def _write(target: Path, picture: Image.Image) -> None:
    """Write the file whole or not at all."""
    from PIL import Image

    from vitfast.runtime.files import whole_file

    try:
        with whole_file(target) as temporary:
            picture.save(temporary, Image.EXTENSION[target.suffix.lower()])
    except (OSError, ValueError) as error:
        raise InputValueError(f"--out {target} cannot be written: {first_line(error)}") from error
