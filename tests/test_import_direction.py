"""Imports go one way, and heavy or optional packages stay in the rooms that may know them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms of lower rank.
RANK = {
    "errors": 0,
    "settings": 1,
    "runtime": 2,
    "ops": 3,
    "testing": 4,
    "plans": 4,
    "engine": 5,
    "blocks": 6,
    "layers": 7,
    "families": 8,
    "swap": 9,
    "bench": 10,
    "check": 11,
    "demo": 11,
    "cli": 12,
}
COMMANDS = ("bench/", "check/", "demo/", "cli/")
# Third-party package -> path prefixes inside vitfast/ that may import it.
HOMES = {
    "torch": (
        "runtime/", "ops/", "plans.py", "testing/", "engine/", "blocks/", "layers/", "families/",
        "swap.py", *COMMANDS,
    ),
    "timm": ("layers/", "families/", "swap.py", *COMMANDS),
    "triton": ("runtime/", "ops/", "testing/"),
    "xformers": ("ops/attention/",),
    "rich": ("bench/", "cli/"),
    "einops": ("ops/", "testing/"),
    "pytest": (),
    "pybind11": (),
}  # fmt: skip


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, except those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from imports(other, package)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        else:
            yield from imports(node, package)


def violations(source: str, path: str) -> list[str]:
    """What a file at `path`, relative to the package, imports against the rules."""
    room = path.split("/")[0].removesuffix(".py")
    package = ".".join(["vitfast", *path.split("/")[:-1]])
    found = []
    for line, name in imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top == "vitfast":
            target = rest.split(".")[0]
            # The package itself and the command's entry point stand above every room.
            if target in RANK and RANK.get(room, 99) < RANK[target]:
                found.append(f"{path}:{line}: {room} imports {name}")
            elif target in RANK and room != target and RANK.get(room) == RANK[target]:
                found.append(f"{path}:{line}: {room} and {target} stand side by side")
        elif top in HOMES and not path.startswith(HOMES[top]):
            found.append(f"{path}:{line}: {top} may be imported only in {HOMES[top] or 'tests'}")
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_one_way(file):
    assert violations(file.read_text(), file.relative_to(PACKAGE).as_posix()) == []


def test_every_room_has_a_rank():
    rooms = {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in FILES}
    assert rooms - set(RANK) <= {"__init__", "__main__", "_build_info"}


@pytest.mark.parametrize(
    "path, source",
    [
        ("runtime/dispatch.py", "from vitfast.ops import spec"),
        ("runtime/dispatch.py", "from vitfast import layers"),
        ("runtime/dispatch.py", "def f():\n    import vitfast.swap"),
        ("ops/spec.py", "from ..layers import block"),
        ("ops/attention/api.py", "from ...cli.main import main"),
        ("ops/spec.py", "import timm.layers"),
        ("settings.py", "import torch"),
        ("layers/block.py", "try:\n    import xformers.ops\nexcept ImportError:\n    pass"),
        ("testing/errors.py", "from vitfast.layers import Block"),
        ("bench/suite.py", "from vitfast.check import hardware"),
        ("check/fuzz.py", "from vitfast.demo import photo"),
        ("__init__.py", "import torch"),
    ],
)
def test_the_rule_rejects(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("layers/block.py", "import timm, torch\nfrom vitfast.ops import attention"),
        ("ops/attention/api.py", "from . import reference\nfrom ..spec import OpSpec"),
        ("ops/spec.py", "if TYPE_CHECKING:\n    from vitfast.layers import Block"),
        ("cli/demo.py", "from vitfast.bench import timer"),
        ("demo/showcase.py", "import timm\nfrom vitfast.bench import timer"),
    ],
)
def test_the_rule_accepts(path, source):
    assert violations(source, path) == []
