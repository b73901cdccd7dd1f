"""Launches of Triton kernels in the package: all go through `kernel_calls.launch`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
LAUNCHING = (
    "runtime/kernel_calls.py",
    "runtime/launch_lists.py",  # again what `kernel_calls.launch` has launched
    "testing/recorded.py",  # in place of `kernel_calls.launch`
)


def launches(tree: ast.AST) -> Iterator[int]:
    """Lines of calls such as `forward_kernel[...](...)` and `_KERNELS[...][...](...)`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Subscript):
            continue
        launched = node.func.value
        ending = "kernel"
        if isinstance(launched, ast.Subscript):
            launched, ending = launched.value, "KERNELS"
        if isinstance(launched, ast.Name | ast.Attribute):
            name = launched.id if isinstance(launched, ast.Name) else launched.attr
            if name.endswith(ending):
                yield node.lineno


def test_every_launch_goes_through_kernel_calls():
    """Recorded lists of launches, which are replayed without Python, must see every one of them."""
    found = [
        f"{name}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (name := path.relative_to(PACKAGE).as_posix()) not in LAUNCHING
        for line in launches(ast.parse(path.read_text()))
    ]
    assert not found, f"use kernel_calls.launch: {', '.join(found)}"


@pytest.mark.parametrize(
    ("source", "is_launch"),
    [
        ("kernel[(3,)](x)", True),
        ("forward_kernel[grid](x, BLOCK=16)", True),
        ("kernels.sums_kernel[grid](x)", True),
        ("_KERNELS[which][(3,)](**given)", True),
        ("kernel_calls.launch(kernel, 3, (x,), {}, config)", False),
        ("kernel[0]", False),
        ("_KERNELS[which]", False),
        ("_CHECKS[name](value)", False),
    ],
)
def test_launches_are_told_from_other_calls(source, is_launch):
    assert bool(list(launches(ast.parse(source)))) == is_launch
