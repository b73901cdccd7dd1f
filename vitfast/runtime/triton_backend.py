"""A Triton backend of an op: loaded at its first call, and picked unasked where it is trusted."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from vitfast.runtime import trust
from vitfast.runtime.dispatch import Backend
from vitfast.runtime.launches import arch_of, choice_of
from vitfast.runtime.triton import available, is_launch_failure


def lazy(
    module: str,
    can_run: Callable[..., list[str]],
    *,
    key: Callable[..., dict[str, Any]] | None = None,
) -> Backend:
    """A Triton backend whose module, with `forward` and `backward`, is imported at its first call.

    Args:
        can_run: reasons against; must not need the module.
        key: for ops that a vendor's kernel may do faster: what that depends on, from the op's
            arguments. They are picked where the device's table says so for the nearest problem.
    """

    def call(function: str) -> Callable[..., Any]:
        return lambda *args: getattr(_imported(module), function)(*args)

    op = module.split(".")[-2]

    def unproven(first: Any, *args: Any, train: bool) -> str:
        x = _first_tensor(first)
        why = trust.doubt(op, x.device, x.dtype, train)
        if why or key is None:
            return why
        arch = arch_of(x.device)
        if choice_of(f"{op}.backend", arch, key(first, *args)) == "triton":
            return ""
        return f"{arch.name}'s table does not show it to be the fastest here"

    def withdraw(error: BaseException, first: Any, *args: Any, train: bool) -> bool:
        if not is_launch_failure(error):
            return False
        x = _first_tensor(first)
        trust.withdraw(op, x.device, x.dtype, error)
        return True

    return Backend(
        "triton", call("forward"), can_run, call("backward"), available, unproven, withdraw
    )


_imported = functools.cache(importlib.import_module)


def _first_tensor(first: Any) -> torch.Tensor:
    """A call's first argument is a tensor, or a tuple that begins with one."""
    found: torch.Tensor = first if isinstance(first, torch.Tensor) else first[0]
    return found
