"""Which children a fused forward may read the weights of, and which it has to call.

A fused forward reads `child.weight` instead of calling the child, so it is right only while the
child is exactly what it seems: timm's or torch's own class, no hook on it, no replaced forward, and
plain tensors for weights. Anything else (LoRA, a quantised linear, pruning, a parametrization, a
DTensor, a user's hook) is `Called` as timm calls it: a linear layer alone, where timm's forward
calls it and the rest can do with its result; otherwise the half of the block that it lies in. What
neither helps makes the layer run timm's forward for that call. All of this can change between two
calls: the check runs on every call, at about 0.3 us a child, or `engine.memo` sees that nothing has
changed since it last did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm import layers as timm_layers
from timm.layers import DropPath, activations
from torch import nn

from vitfast.engine.eligibility import (
    CALLERS,
    PLAIN,
    check_original,
    check_unhidden,
    has_hooks,
    is_own_method,
    methods,
)
from vitfast.plans import Called, DropRate, Linear, Unfit, Unsupported
from vitfast.runtime.native import is_readable

Children = dict[str, Any]  # a module's `_modules`

TIMM_CLASSES: dict[type, type[nn.Module]] = {}
"""timm's or torch's class for each drop-in, which `Layer` enters."""


def timm_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one of timm or torch that a drop-in stands in for.

    What is read of both is the same, so that the tables by class hold only timm's and torch's.
    """
    kind = type(module)
    return TIMM_CLASSES.get(kind, kind)


def forget_own_forward(module: nn.Module) -> None:
    """Take off a forward that would hide that of the class which the module is about to get."""
    if "forward" in module.__dict__ and is_own_method(module, "forward"):
        del module.__dict__["forward"]


def check_bare(module: nn.Module, name: str) -> None:
    """No hooks, no forward or other method put on the instance (as accelerate does) or class."""
    state = module.__dict__
    if has_hooks(module):
        raise Unfit(f"{name} has hooks")
    for method in methods(type(module)):
        if method in state and not is_own_method(module, method):
            raise Unfit(f"{name} has a replaced {method}")
    for call in CALLERS:
        if call in state:
            raise Unfit(f"{name} is called by something else")
    check_unhidden(module, name)
    check_original(module)


def read_parameter(module: nn.Module, name: str) -> Any:
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


def expect_vector(t: torch.Tensor | None, width: int, name: str) -> torch.Tensor | None:
    """A vector of this many elements, or None; timm's arithmetic takes what broadcasts, too."""
    if t is not None and t.shape != (width,):
        raise Unfit(f"{name} has shape {tuple(t.shape)} instead of ({width},)")
    return t


def read_optional_parameter(module: nn.Module, name: str) -> Any:
    """As `read_parameter`, of one that may have been set to None before it was ever registered."""
    return read_parameter(module, name) if name in module._parameters else getattr(module, name)


def read_linear(children: Children, name: str, *, pointwise: bool = False) -> Linear:
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
    weight = read_parameter(module, "weight")
    if weight is None:
        raise Unfit(f"{name} has no weight")
    return Linear(
        weight, expect_vector(read_parameter(module, "bias"), len(weight), f"bias of {name}")
    )


def read_or_call_linear(children: Children, name: str) -> Linear | Called:
    """As `read_linear`, of a child that timm's forward calls: any other kind can be called, too.

    Not where what it holds are tensors of another class, of which its result may be another.
    """
    try:
        return read_linear(children, name)
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


def read_parts(*reads: Callable[[], Any]) -> list[Any]:
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


def describe_called(plan: Any) -> Iterator[str]:
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


def read_drop_path(children: Children, name: str) -> DropRate | None:
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


def read_activation(children: Children, name: str) -> str:
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


def read_layer_scale(children: Children, name: str, *, nchw: bool = False) -> torch.Tensor | None:
    """gamma [C] of a LayerScale child (LayerScale2d, if `nchw`); None for an nn.Identity."""
    module = children[name]
    check_bare(module, name)
    if type(module) is nn.Identity:
        return None
    if timm_class(module) is not (timm_layers.LayerScale2d if nchw else timm_layers.LayerScale):
        raise Unfit(f"{name} is a {type(module).__name__}, not timm's LayerScale")
    if module.inplace:
        raise Unfit(f"{name} works in place")
    gamma = read_parameter(module, "gamma")
    if gamma is None:
        raise Unfit(f"{name} has no gamma")
    return gamma
