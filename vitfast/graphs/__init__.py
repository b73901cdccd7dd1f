"""Whole models replayed as CUDA graphs: at small batches a GPU otherwise waits for Python.

    model = vitfast.graphed(model)

The model stays the object it was. Its class becomes a subclass made for it, of the same name, whose
methods replay a graph where they can and call the model's own where they cannot.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from vitfast.errors import InputTypeError, InputValueError
from vitfast.graphs.store import Options, Store

__all__ = ["beneath", "explain", "forget", "graphed", "methods_of", "over", "ungraphed"]

Model = TypeVar("Model", bound=nn.Module)
_STORE = "_vitfast_graphs"
"""The attribute of a graphed model that its Store is."""
_METHODS = "_vitfast_graphed_methods"
"""The attribute of a class made here that names the methods it overrides."""


def graphed(
    model: Model,
    *,
    methods: Sequence[str] = ("forward",),
    limit: int = 8,
    warm_up: int = 3,
    clone_outputs: bool = True,
) -> Model:
    """Replay a model's inference on a GPU as CUDA graphs, one for each kind of call.

    A kind is what a graph is captured for: shapes, strides, dtypes and device of the inputs, other
    arguments, autocast, grad and inference mode, the settings of vitfast and of torch that choose
    kernels. A kind's first call is the model's own; its second captures a graph. A graph holds
    while the model is what it was: its modules and their attributes (a swap, a restore, a hook, a
    replaced weight, training mode) and its weights' addresses. Their values may change in place.

    Called as ever are: training and whatever autograd records, tensors on a CPU, what is traced,
    compiled or watched (hooks of submodules, dispatch modes, functorch), arguments that are neither
    tensors nor constants nor lists, tuples or dictionaries of those, and calls within another
    capture. What cannot be captured (a decision by values on the GPU, say), or changes its inputs
    or its model as it runs, is called as ever after one warning. What a forward does besides
    launching kernels, such as printing, happens when it is captured and not in a replay.

    Args:
        model: any module; a DistributedDataParallel or DataParallel model has its module graphed.
        methods: which methods, by name: "forward_features" and "forward_intermediates" of timm's
            models, too.
        limit: graphs that are kept, of all kinds; the one that was not called for longest goes.
            They share one pool of memory for what they compute in between.
        warm_up: calls on a side stream before a capture, in which kernels are compiled and chosen.
        clone_outputs: give copies, which the caller owns. False gives the graph's own tensors, as
            torch.cuda.make_graphed_callables does: the next call of the kind overwrites them.

    Returns:
        The same model. Calls from several threads and streams run one after another. Copies and
        pickles of it are graphed, too, without the graphs.

    Raises:
        InputTypeError: it is no module; or one of torch.compile, TorchScript or FSDP.
        InputValueError: a number below one, or a method that the model's class does not have or
            that the model has an own one of (accelerate's hooks), which would hide the graphs.
    """
    inner = _inner(model)
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    for what, number in (("limit", limit), ("warm_up", warm_up)):
        if type(number) is not int or number < 1:
            raise InputValueError(f"graphed: {what} is {number!r}, expected an integer from 1 on")
    ungraphed(inner)
    for name in names:
        if not callable(getattr(type(inner), name, None)):
            raise InputValueError(f"graphed: {type(inner).__name__} has no method {name!r}")
        if name in inner.__dict__:
            raise InputValueError(
                f"graphed: the model's {name} was replaced on the instance; graph it before that"
            )
    if not names:
        raise InputValueError("graphed: methods names none")
    store = Store(Options(names, limit, warm_up, bool(clone_outputs)))
    store.is_of(inner)
    inner.__class__ = over(type(inner), names)
    inner.__dict__[_STORE] = store
    return model


def ungraphed(model: Model) -> Model:
    """Give a graphed model its own class back and drop its graphs; of another nothing changes.

    Returns:
        The same model.

    Raises:
        InputTypeError: as `graphed`.
    """
    inner = _inner(model)
    inner.__class__ = beneath(type(inner))
    inner.__dict__.pop(_STORE, None)
    return model


def forget(model: nn.Module) -> None:
    """Drop the graphs of a model, after an edit that it cannot notice (of a list among a module's
    attributes, say); they are captured anew when needed."""
    store = model.__dict__.get(_STORE)
    if store is not None:
        store.forget()


def explain(model: nn.Module) -> str:
    """For each kind of call that a graphed model had: whether it is replayed, and why not."""
    store = _inner(model).__dict__.get(_STORE)
    return "the model is not graphed" if store is None else store.describe()


def beneath(kind: type[Any]) -> type[Any]:
    """The class that one made here was made of; any other class itself."""
    return kind.__bases__[0] if _METHODS in vars(kind) else kind


def methods_of(kind: type[Any]) -> tuple[str, ...]:
    """The methods that a class made here overrides."""
    found: tuple[str, ...] = vars(kind)[_METHODS]
    return found


_MADE: dict[tuple[type[Any], tuple[str, ...]], type[Any]] = {}


def over(kind: type[Any], methods: tuple[str, ...]) -> type[Any]:
    """A subclass of a module's class, of its name, whose methods replay graphs where they can."""
    made = _MADE.get((kind, methods))
    if made is not None:
        return made
    members: dict[str, Any] = {name: _method(kind, name) for name in methods}
    members |= {
        "__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce_ex, "_apply": _apply, _METHODS: methods,
    }  # fmt: skip
    return _MADE.setdefault((kind, methods), type(kind.__name__, (kind,), members))


def _method(kind: type[Any], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(kind, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(kind, name)  # looked up now: someone may have put another there
        if torch.compiler.is_compiling() or _STORE not in self.__dict__:
            return own(self, *args, **kwargs)
        return self.__dict__[_STORE](self, name, MethodType(own, self), args, kwargs)

    return method


def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
    """nn.Module's: what moves the weights elsewhere lets go of the memory of graphs."""
    forget(self)
    return beneath(type(self))._apply(self, *args, **kwargs)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """As of the class beneath, for a class that cannot be found by its name."""
    kind = type(self)
    parts = super(kind, self).__reduce_ex__(protocol)
    if parts[0] is copyreg.__newobj__ and parts[1] == (kind,):  # type: ignore[attr-defined]
        return _new, (beneath(kind), methods_of(kind)), *parts[2:]
    return parts


def _new(kind: type[Any], methods: tuple[str, ...]) -> Any:
    """An empty module of a class that replays graphs, for copies and pickles."""
    made: Any = over(kind, methods)
    return made.__new__(made)


def _inner(model: Any) -> nn.Module:
    """The model inside torch's wrappers for several GPUs."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"graphed: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _inner(model.module)
    if "_orig_mod" in model._modules:
        raise InputTypeError(
            'graphed: torch.compile has graphs of its own, by mode="reduce-overhead"; '
            "give the model that was compiled"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError("graphed: TorchScript compiles what it runs; give the model itself")
    if any(
        base.__module__.startswith("torch.distributed.") for base in inspect.getmro(type(model))
    ):
        raise InputTypeError("graphed: weights sharded by torch.distributed are gathered by hooks")
    return model
