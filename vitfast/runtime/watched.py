"""Whether anything waits to see what a call does: modes, transforms, traces, hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from vitfast.runtime import native
from vitfast.settings import settings

PLAIN = (torch.Tensor, nn.Parameter)
"""Classes of tensors that are nothing but that."""


def _unwatched() -> Callable[..., bool]:
    """A function of inputs that gives True only where nothing waits to see each op or module of a
    call, False without the extension.

    It looks at everything at once: one question after the other from Python takes three times as
    long where a model's weights have just passed through the caches.
    """
    extension = native.extension()
    if extension is None:
        return lambda *inputs: False
    kinds = (
        "backward_pre_hooks", "backward_hooks", "forward_pre_hooks", "forward_hooks",
        "forward_hooks_always_called", "forward_hooks_with_kwargs",
    )  # fmt: skip
    hooks = {name: getattr(nn_module, name) for name in (f"_global_{kind}" for kind in kinds)}
    questions = (
        torch._C._is_tracing, torch._C._len_torch_function_stack,
        torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack,
    )  # fmt: skip
    values = (
        (vars(settings), "disable", False),
        (vars(forward_ad), "_current_level", -1),
        *((vars(nn_module), name, found) for name, found in hooks.items()),
    )
    return extension.unwatched(PLAIN, torch.Tensor.is_neg, questions, tuple(hooks.values()), values)


is_unwatched = _unwatched()
"""is_unwatched(x, *others): True where surely nothing waits to see the ops and modules of a call
with these plain, readable tensors (None for absent ones), and `settings.disable` is off; False says
nothing."""
