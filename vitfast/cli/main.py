"""The front door: finds the sub-command, loads only its module, turns errors into one line.

Exit status: what the sub-command returns; 2 for bad usage, bad input or a missing backend; 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from vitfast import __version__
from vitfast.errors import VitfastError

COMMANDS = {
    "info": "this machine, versions, settings, and which backends can run each op",
    "check": "run every op and a model of each family against float64",
    "prove": "test and time all GPU kernels here, in minutes, and keep every result",
    "bench": "time ops, blocks or models beside their peers",
    "tune": "time launch configs of the GPU kernels and write this GPU's table",
    "swap": "report what vitfast.swap would do to a timm model",
    "attend": "lay what a model attends to over a picture",
    "demo": "run real models with timm and with vitfast on a photograph",
    "embed": "turn a folder of images into vectors, in Parquet files",
    "search": "find the images of an embedded folder that are most like others",
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the arguments of `command` are loaded."""
    parser = argparse.ArgumentParser(
        prog="vitfast", description="Fused kernels for timm's vision transformers."
    )
    parser.add_argument("--version", action="version", version=f"vitfast {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{name}: {summary}.")
        if name == command:
            module = importlib.import_module(f"vitfast.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VitfastError, OSError) as error:
        print(f"vitfast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitfast: interrupted", file=sys.stderr)
        return 130
