"""Who computes a call: timm's forward, the public ops or the engine. Nothing else decides it.

`plan_call`, and `memo.recall_plan` with what is remembered, tell whether the call leaves timm's
forward; `takes_engine` then whether it goes to the engine or to the public ops (of blocks that only
the engine knows, such as MetaFormer's, back to timm's forward). The engine may still hand a call
back, by a result of None, whose dtypes or sizes its kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from vitfast.engine import originals
from vitfast.plans import Unfit, tensors_in
from vitfast.runtime import native, trust
from vitfast.runtime.native import is_readable
from vitfast.runtime.watched import PLAIN, is_unwatched
from vitfast.settings import settings

Plan = TypeVar("Plan")


def may_fuse(x: object, *others: object) -> bool:
    """Whether a layer may leave timm's forward for these inputs, whatever its children are.

    No for FX proxies, fake tensors and other subclasses; for tracing, scripting and export, which
    want torch's own ops; under functorch transforms and forward-mode AD, whose rules the ops do not
    have; under a dispatch mode (a FLOP counter, say) or a function mode, which should see what timm
    would do; with a global module hook, which wants to see every child called; for tensors that
    are not to be read by their address; and with `settings.disable`.
    """
    if not torch.compiler.is_compiling() and is_unwatched(x, *others):
        return True
    if type(x) not in PLAIN or settings.disable or _has_any_global_hook():
        return False
    if originals.is_watched():
        return False
    for other in others:
        if other is not None and type(other) not in PLAIN:
            return False
    if torch.compiler.is_compiling():
        # The function of the same name is always true in what torch 2.11 compiles.
        return not torch.compiler._is_exporting_flag
    for t in (x, *others):
        if t is not None and not is_readable(t):  # type: ignore[arg-type]
            return False
    return not _transforms()


def _transforms() -> bool:
    """Whether what is called now is traced, dispatched elsewhere or transformed."""
    return bool(
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_observed(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether something wants to see or change each module or op of a call with these tensors: a
    trace, a mode, a transform or a global hook, as for `may_fuse`; `settings.disable` does not."""
    if is_unwatched(x, *others):
        return False
    return _has_any_global_hook() or originals.is_watched() or _transforms()


def plan_call(
    plan: Callable[[nn.Module], Plan], module: nn.Module, x: object, *others: object
) -> Plan | None:
    """plan(module), or None where this call of the module has to run timm's forward."""
    if not may_fuse(x, *others) or untrusted(module, x):
        return None
    try:
        return planned(plan, module)
    except Unfit:
        return None


def untrusted(module: nn.Module, x: object) -> str:
    """As `trust.untrusted`, of what the drop-in's fused forward would run for this input."""
    return trust.untrusted(getattr(type(module), "ops", ()), x)  # type: ignore[arg-type]


def planned(plan: Callable[[nn.Module], Plan], module: nn.Module) -> Plan:
    """plan(module), of a module that is called in its own forward.

    Raises:
        Unfit: as the plan does, and where something else stands where timm's forward of the module
            calls a method or function.
    """
    state = module.__dict__
    for name in methods(type(module)):
        # A replaced forward is what called this one.
        if name in state and name != "forward" and not is_own_method(module, name):
            raise Unfit(f"its {name} is replaced")
    check_unhidden(module, "it")
    check_original(module)
    return plan(module)


def takes_engine(x: torch.Tensor, plan: Any = (), *others: Any) -> bool:
    """Whether a call that leaves timm's forward is inference on the CPU, which the engine computes.

    Not on a GPU; nor where torch.compile traces the call, autograd records it, paths are dropped
    (stochastic depth), another backend was asked for, or there is no C++ extension.

    Args:
        x: the call's input.
        plan, others: the plan, and tensors, None or tuples of them, that the call depends on, too.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or getattr(plan, "drops", False):
        return False
    if settings.backend not in ("auto", "cpu") or native.reasons():
        return False
    return not records_grad(x, plan, others)


def records_grad(*values: Any) -> bool:
    """Whether autograd records an operation on these tensors, and those in tuples such as plans."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(values))


CALLERS = ("_call_impl", "_wrapped_call_impl", "_compiled_call_impl")
"""What `__call__` runs, where an instance has its own; `nn.Module.compile` sets the last."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees what goes into a module, comes out of it, or goes back through it."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


_METHODS: dict[type, tuple[str, ...]] = {}


_UNCALLED = {"extra_repr", "init_weights", "reset_parameters", "init_non_persistent_buffers"}


@torch.compiler.assume_constant_result
def methods(kind: type[nn.Module]) -> tuple[str, ...]:
    """The methods of a module class that its forward may call, and forward itself."""
    found = _METHODS.get(kind)
    if found is None:
        added = kind.__mro__[: kind.__mro__.index(nn.Module)]
        names = {n for base in added for n, value in vars(base).items() if callable(value)}
        found = tuple(n for n in sorted(names - _UNCALLED) if not n.startswith("__"))
        _METHODS[kind] = found = ("forward", *(n for n in found if n != "forward"))
    return found


def is_own_method(module: nn.Module, name: str) -> bool:
    """Whether a method in the instance's dictionary is but that of its class.

    accelerate leaves such a forward where its hook was removed. A drop-in computes what the class
    does that it stands in for, whose forward the instance may still hold.
    """
    found = module.__dict__[name]
    function = getattr(found, "__func__", None)
    if function is None or found.__self__ is not module:
        return False
    kinds = (type(module), getattr(type(module), "timm_class", None))
    return any(function is getattr(kind, name, None) for kind in kinds)


def check_unhidden(module: nn.Module, name: str) -> None:
    """That no attribute of the instance hides a child or parameter of the same name."""
    state = module.__dict__
    for held in (state["_parameters"], state["_modules"], state["_buffers"]):
        for own in held:
            if own in state:
                raise Unfit(f"{name} has an attribute that hides its {own}")


def check_original(module: nn.Module) -> None:
    replaced = originals.replaced(type(module))
    if replaced:
        raise Unfit(f"{replaced} was replaced")
