"""Imports go one way and in no circle; heavy or optional packages stay in the rooms that may know
them. An import for type checkers only, or inside a function, is an import like any other."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms of lower rank.
RANK = {
    "errors": 0,
    "report": 0,
    "loading": 1,
    "pictures": 1,
    "settings": 1,
    "runtime": 2,
    "ops": 3,
    "testing": 4,
    "plans": 4,
    "engine": 5,
    "selftest": 5,
    "blocks": 6,
    "layers": 7,
    "families": 8,
    "graphs": 8,
    "preparation": 8,
    "swap": 9,
    "embedding": 10,
    "highres": 10,
    "bench": 11,
    "check": 12,
    "demo": 12,
    "cli": 13,
}
COMMANDS = ("embedding/", "highres/", "bench/", "check/", "demo/", "cli/")
# Third-party package -> path prefixes inside vitfast/ that may import it.
HOMES = {
    "torch": (
        "runtime/", "ops/", "plans.py", "testing/", "engine/", "blocks/", "layers/", "families/",
        "selftest/", "graphs/", "preparation.py", "loading.py", "swap.py", *COMMANDS,
    ),
    "timm": ("layers/", "families/", "loading.py", "swap.py", *COMMANDS),
    "triton": ("runtime/", "ops/", "testing/"),
    "xformers": ("ops/attention/",),
    "rich": ("highres/", "bench/", "cli/"),
    "pyarrow": ("embedding/",),
    "daft": ("embedding/",),
    "ray": (),
    "usearch": ("embedding/",),
    "einops": ("ops/", "testing/"),
    "pytest": (),
    "pybind11": (),
}  # fmt: skip


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def package_of(path: str) -> str:
    """The dotted name of the package that a file at `path`, relative to vitfast/, lies in."""
    return ".".join(["vitfast", *path.split("/")[:-1]])


def violations(source: str, path: str) -> list[str]:
    """What a file at `path`, relative to the package, imports against the rules."""
    room = path.split("/")[0].removesuffix(".py")
    found = []
    for line, name in imports(ast.parse(source), package_of(path)):
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


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules each of which imports the next, the first being the last; empty if there are none.

    `from vitfast.a import b` is an import of the module vitfast.a.b if there is one, else of
    vitfast.a. The root hands on names of what stands above every room, and so does not count.

    Args:
        sources: by path relative to vitfast/.
    """
    modules = {
        f"{package_of(path)}.{Path(path).stem}".removesuffix(".__init__"): path for path in sources
    }
    modules.pop("vitfast", None)
    graph = {}
    for module, path in modules.items():
        tree = ast.parse(sources[path])
        names = [name for _, name in imports(tree, package_of(path))]
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = found & modules.keys() - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]  # it names who is imported first
    return []


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_one_way(file):
    assert violations(file.read_text(), file.relative_to(PACKAGE).as_posix()) == []


def test_no_file_imports_itself_through_others():
    assert circle({f.relative_to(PACKAGE).as_posix(): f.read_text() for f in FILES}) == []


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
        ("ops/spec.py", "if TYPE_CHECKING:\n    from vitfast.layers import Block"),
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
        ("cli/demo.py", "from vitfast.bench import timer"),
        ("demo/showcase.py", "import timm\nfrom vitfast.bench import timer"),
    ],
)
def test_the_rule_accepts(path, source):
    assert violations(source, path) == []


@pytest.mark.parametrize(
    "back",
    [
        "import vitfast.ops.a",
        "from vitfast.ops import a",
        "from vitfast.ops.a import name",
        "from . import a",
        "from .a import name",
        "def f():\n    from vitfast.ops import a",
        "if TYPE_CHECKING:\n    from vitfast.ops.a import Name",
        "from vitfast.ops import name",  # of ops/__init__.py, which imports a
        "from vitfast.blocks import c",  # which imports a
    ],
)
def test_a_circle_is_found(back):
    sources = {
        "__init__.py": "from vitfast.blocks import c",
        "ops/__init__.py": "from vitfast.ops.a import name",
        "ops/a.py": "from vitfast.ops import b",
        "ops/b.py": "import vitfast",
        "blocks/c.py": "from vitfast.ops.a import name",
    }
    assert circle(sources) == []
    found = circle(sources | {"ops/b.py": back})
    assert found[0] == found[-1] and {"vitfast.ops.a", "vitfast.ops.b"} <= set(found)
