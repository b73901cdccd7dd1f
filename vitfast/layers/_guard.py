"""Which children a fused forward may read the weights of, and when it may run at all.

A fused forward reads `child.weight` instead of calling the child, so it is right only while the
child is exactly what it seems: timm's or torch's own class, no hook on it, no replaced forward, and
plain tensors for weights. Anything else (LoRA, a quantised linear, pruning, a parametrization, a
DTensor, a user's hook) is `Called` as timm calls it: a linear layer alone, where timm's forward
calls it and the rest can do with its result; otherwise the half of the block that it lies in. What
neither helps makes the layer run timm's forward for that call. All of this can change between two
calls: the check runs on every call, at about 0.3 us a child, or `_memo` sees that nothing has
changed since it last did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from timm.layers import DropPath, activations
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.modules.module import _has_any_global_hook

from vitfast.layers import _originals
from vitfast.plans import Called, DropRate, Linear, Unfit, Unsupported
from vitfast.runtime import native
from vitfast.runtime.native import is_readable
from vitfast.settings import settings

PLAIN = (torch.Tensor, nn.Parameter)
Children = dict[str, Any]  # a module's `_modules`
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
    if _originals.is_watched():
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
    return not (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _unwatched() -> Callable[..., bool]:
    """A function of inputs that gives True only where `may_fuse` does, False without the extension.

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
    return extension.unwatched(  # type: ignore[no-any-return]
        PLAIN, torch.Tensor.is_neg, questions, tuple(hooks.values()), values
    )


is_unwatched = _unwatched()
"""is_unwatched(x, *others): True where `may_fuse` surely is; False says nothing."""


def ready(
    plan: Callable[[nn.Module], Plan], module: nn.Module, x: object, *others: object
) -> Plan | None:
    """plan(module), or None where this call of the module has to run timm's forward."""
    if not may_fuse(x, *others):
        return None
    try:
        return planned(plan, module)
    except Unfit:
        return None


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
    _check_original(module)
    return plan(module)


def records_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_CALLERS = ("_call_impl", "_wrapped_call_impl", "_compiled_call_impl")
"""What `__call__` runs, where an instance has its own; `nn.Module.compile` sets the last."""
_METHODS: dict[type, tuple[str, ...]] = {}
_UNCALLED = {"extra_repr", "init_weights", "reset_parameters", "init_non_persistent_buffers"}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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


def forget_own_forward(module: nn.Module) -> None:
    """Take off a forward that would hide that of the class which the module is about to get."""
    if "forward" in module.__dict__ and is_own_method(module, "forward"):
        del module.__dict__["forward"]


def check_bare(module: nn.Module, name: str) -> None:
    """No hooks, no forward or other method put on the instance (as accelerate does) or class."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        raise Unfit(f"{name} has hooks")
    for method in methods(type(module)):
        if method in state and not is_own_method(module, method):
            raise Unfit(f"{name} has a replaced {method}")
    for call in _CALLERS:
        if call in state:
            raise Unfit(f"{name} is called by something else")
    check_unhidden(module, name)
    _check_original(module)


def check_unhidden(module: nn.Module, name: str) -> None:
    """That no attribute of the instance hides a child or parameter of the same name."""
    state = module.__dict__
    for held in (state["_parameters"], state["_modules"], state["_buffers"]):
        for own in held:
            if own in state:
                raise Unfit(f"{name} has an attribute that hides its {own}")


def _check_original(module: nn.Module) -> None:
    replaced = _originals.replaced(type(module))
    if replaced:
        raise Unfit(f"{replaced} was replaced")


def tensor(module: nn.Module, name: str) -> Any:
    """A parameter that is an ordinary tensor, or None where it was built without."""
    found = module._parameters.get(name, module)
    if found is None:
        return None
    if type(found) not in PLAIN:
        raise Unfit(f"{name} of {type(module).__name__} is not a plain parameter")
    check_readable(found, f"{name} of {type(module).__name__}")
    return found


def check_readable(t: torch.Tensor, name: str) -> None:
    """A tensor that kernels may read; compiled code passes it through torch's dispatcher."""
    if not torch.compiler.is_compiling() and not is_readable(t):
        raise Unfit(f"{name} is no dense tensor that can be read by its address")


def vector(t: torch.Tensor | None, width: int, name: str) -> torch.Tensor | None:
    """A vector of this many elements, or None; timm's arithmetic takes what broadcasts, too."""
    if t is not None and t.shape != (width,):
        raise Unfit(f"{name} has shape {tuple(t.shape)} instead of ({width},)")
    return t


def optional_parameter(module: nn.Module, name: str) -> Any:
    """As `tensor`, for a parameter that may have been set to None before it was ever registered."""
    return tensor(module, name) if name in module._parameters else getattr(module, name)


def linear(children: Children, name: str, *, pointwise: bool = False) -> Linear:
    """The weights of a child that must be exactly an nn.Linear; `pointwise`: or a 1x1 nn.Conv2d."""
    module = children[name]
    kind = nn.Conv2d if pointwise and type(module) is nn.Conv2d else nn.Linear
    if type(module) is not kind:
        raise Unfit(f"{name} is a {type(module).__name__}, not torch.nn.Linear")
    if kind is nn.Conv2d and not (
        module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    ):
        raise Unsupported(f"{name} is no linear layer over channels")
    check_bare(module, name)
    weight = tensor(module, "weight")
    if weight is None:
        raise Unfit(f"{name} has no weight")
    return Linear(weight, vector(tensor(module, "bias"), len(weight), f"bias of {name}"))


def layer(children: Children, name: str) -> Linear | Called:
    """As `linear`, of a child that timm's forward calls: any other kind of it can be called, too.

    Not where what it holds are tensors of another class, of which its result may be another.
    """
    try:
        return linear(children, name)
    except Unfit as reason:
        module = children[name]
        if module is None or not _holds_plain(module):
            raise
        return Called(str(reason), module)


def _holds_plain(module: nn.Module) -> bool:
    """Whether all parameters in a module and below it are ordinary tensors."""
    return all(type(p) in PLAIN for p in module._parameters.values() if p is not None) and all(
        _holds_plain(child) for child in module._modules.values() if child is not None
    )


def parts(*reads: Callable[[], Any]) -> list[Any]:
    """What each of some functions reads of a block; a `Called` for one that cannot.

    Raises:
        Unfit: none can; Unsupported if none ever will.
    """
    found: list[Any] = []
    reasons: list[tuple[type[Unfit], str]] = []
    for read in reads:
        try:
            found.append(read())
        except Unfit as reason:
            reasons.append((type(reason), str(reason)))
            found.append(Called(str(reason)))
    if len(reasons) == len(reads):
        kind, why = min(reasons, key=lambda r: r[0] is Unsupported)
        raise kind(why)
    return found


def called(plan: Any) -> Iterator[str]:
    """What a plan calls instead of reading it: "calls attn as timm does: qkv has hooks", say."""
    for name in getattr(plan, "_fields", ()):
        value = getattr(plan, name)
        for one in value if name == "qkv" else (value,):
            if isinstance(one, Called):
                yield f"calls {name if one.module is None else 'a child'} as timm does: {one.why}"


def check_read(*layers: Linear | Called | None) -> None:
    """That linear layers are read, for what cannot call one.

    Raises:
        Unfit: one of them has to be called.
    """
    for one in layers:
        if isinstance(one, Called):
            raise Unfit(one.why)


def check_no_dropout(children: Children, name: str, training: bool | None = None) -> None:
    """A dropout that does nothing now. `training`: what decides, where it is not its own mode."""
    module = children[name]
    if type(module) is not nn.Dropout:
        if type(module) is not nn.Identity:
            raise Unfit(f"{name} is a {type(module).__name__}, not torch.nn.Dropout")
    elif module.p and (module.training if training is None else training):
        raise Unfit(f"{name} drops {module.p} while training")
    check_bare(module, name)


def drop_path(children: Children, name: str) -> DropRate | None:
    """The stochastic depth that a child would apply now; None if none."""
    module = children[name]
    check_bare(module, name)
    if type(module) is nn.Identity:
        return None
    if type(module) is not DropPath:
        raise Unfit(f"{name} is a {type(module).__name__}, not timm's DropPath")
    if not module.drop_prob or not module.training:
        return None
    return DropRate(1 - module.drop_prob, module.scale_by_keep)


ACTIVATIONS = {
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
    activations.Sigmoid: "sigmoid",
    activations.Swish: "silu",
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
}


def activation(children: Children, name: str) -> str:
    """The name of an activation by its class: timm's GELU has no `approximate` to look at."""
    module = children[name]
    if type(module) is nn.GELU:
        found = "gelu_tanh" if module.approximate == "tanh" else "gelu"
    else:
        found = ACTIVATIONS.get(type(module), "")
    if not found:
        raise Unsupported(f"activation {type(module).__name__} is not implemented")
    check_bare(module, name)
    return found
