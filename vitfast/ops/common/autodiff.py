"""Gradients of references through autograd, and the order in which an op returns gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_AUTOGRAD_KEYS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
)


def _recording() -> Any:
    """Autograd within the implementation of a registered op, where the dispatcher shuts it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def gradients(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None] | Callable[..., Sequence[torch.Tensor | None]],
) -> tuple[torch.Tensor, ...]:
    """Gradients of `function(*inputs)` for each input; empty tensors for absent inputs.

    Args:
        function: takes the inputs, gives one tensor or a tuple of them.
        grads: one per output; None where the output is unused. Or what makes them of the outputs,
            where their gradients depend on them.
    """
    with _recording(), torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in inputs
        ]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        if callable(grads):
            with torch.no_grad():
                grads = grads(*(o.detach() for o in outputs))
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
        )
    result = []
    for t in leaves:
        if t is None or not t.requires_grad:
            result.append(torch.empty(0, dtype=torch.float32, device=pairs[0][1].device))
            continue
        g = next(found)
        result.append(torch.zeros_like(t) if g is None else g.contiguous())
    return tuple(result)


def in_order(
    fields: Sequence[str], **grads: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients by name as autograd takes them from an op: one for each argument.

    Args:
        fields: names of the op's arguments before `backend`, in the order of its schema.
        grads: gradients by the argument's name; all other arguments, `backend` too, get None.
    """
    return *(grads.get(name) for name in fields), None
