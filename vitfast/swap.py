"""swap, restore, create_model, and the report of what was swapped and what was not.

A module is swapped by giving it the drop-in class (`module.__class__ = ...`): the object, its
parameters, hooks and place in the model stay. Only exact timm classes are swapped; which become
what is read from `vitfast.families`.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import ModuleType
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from vitfast import graphs, layers
from vitfast.engine import memo
from vitfast.engine.eligibility import planned
from vitfast.engine.products.weights import CACHE, clear_weight_cache
from vitfast.errors import InputTypeError, InputValueError, SwapError
from vitfast.families import Gap, gap_table, layer_table
from vitfast.layers import Layer
from vitfast.layers.reading.children import describe_called, forget_own_forward
from vitfast.layers.reading.position import forget_tables
from vitfast.plans import Unfit, Unsupported, tensors_in
from vitfast.preparation import prepare_ops
from vitfast.report import AS_TIMM, UNTRUSTED, Skipped, Swapped, SwapReport
from vitfast.runtime import native, triton
from vitfast.runtime.trust import untrusted
from vitfast.runtime.wrappers import unwrapped
from vitfast.selftest.session import is_testable
from vitfast.settings import logger, settings

__all__ = ["SwapReport", "Skipped", "Swapped", "create_model", "refresh", "restore", "swap"]

Model = TypeVar("Model", bound=nn.Module)
Choice = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def swap(
    model: nn.Module,
    *,
    only: Choice | None = None,
    skip: Choice | None = None,
    strict: bool = False,
) -> SwapReport:
    """Give the modules of a timm model their drop-in classes, in place.

    Weights, `state_dict`, hooks and outputs stay what they are (outputs within the error of timm's
    own arithmetic). A module that was swapped before stays swapped and is reported so.

    Args:
        model: any module; compiled, DataParallel and DistributedDataParallel models are swapped
            inside their wrapper, whose name is left out of the paths.
        only: swap nothing but these: module paths with shell wildcards ("blocks.*.mlp"), or
            classes of timm or of `vitfast.layers`. What lies below a match is matched as well.
        skip: leave these alone, in the same terms; wins over `only`. A block with a skipped child
            is left alone too, since a swapped block reads its children's weights.
        strict: raise, and change nothing, where a block or an attention module would have to be
            left alone for another reason than `only` and `skip`, where nothing would be swapped,
            and where none of vitfast's kernels can run in this process. Whether some can on the
            model's device and in its dtype is not asked, for it may still be moved: see
            `SwapReport.gains_nothing`.

    Returns:
        SwapReport, with every module that was swapped or is known and was not.

    Raises:
        InputTypeError: the model is no torch.nn.Module, or a choice is no string or class.
        InputValueError: a choice matches no module of the model.
        SwapError: `strict`, and something had to be left alone, or nothing would be gained.
    """
    model = unwrapped(model)
    chosen = _Selection(model, only, skip)
    report, todo = _decided(model, chosen, strict)
    if strict and (report.no_kernels or not report.swapped):
        why = report.no_kernels or report.gains_nothing
        raise SwapError(f"{report.model} would gain nothing: {why}; nothing was changed")
    if _test_kernels(model, report):
        report, todo = _decided(model, chosen, strict)
    for module, layer in todo:
        forget_own_forward(module)
        module.__class__ = _with_class(type(module), layer)
    logger.info("%s", report)
    return report


def _decided(
    model: nn.Module, chosen: _Selection, strict: bool
) -> tuple[SwapReport, list[tuple[nn.Module, type[Any]]]]:
    """The report of a swap, and the modules that are to get another class, with that class."""
    todo: list[tuple[nn.Module, type[Any]]] = []
    report = SwapReport(_own_class(model).__name__, no_kernels=_no_kernels())
    fused: set[int] = set()
    for path, module in model.named_modules():
        entry = _decide(path, module, chosen, fused)
        if isinstance(entry, Skipped):
            if strict and entry.role != "part" and not entry.by_choice:
                what = f"{path or 'the model'} ({entry.timm_class})"
                raise SwapError(f"{what} cannot be swapped: {entry.reason}; nothing was changed")
            report.skipped.append(entry)
        elif entry is not None:
            report.swapped.append(entry)
            if not isinstance(module, Layer):
                todo.append((module, layer_table()[_own_class(module)]))
    return report, todo


def _test_kernels(model: nn.Module, report: SwapReport) -> bool:
    """Test the kernels of the layers in a report where the model is, if that is called for and was
    not done yet; whether anything is known now that was not before."""
    first = next(model.parameters(), None)
    if first is None or not is_testable(first.device) or settings.backend != "auto":
        return False
    names = {entry.layer_class for entry in report.swapped if entry.note.startswith(UNTRUSTED)}
    found = [layer.ops for layer, name in _layers().items() if name in names]
    return bool(found) and bool(prepare_ops(dict.fromkeys(chain(*found)), first).tested)


def restore(model: Model) -> Model:
    """Give every swapped module timm's class back: the model computes bitwise what it did.

    Returns:
        The same model.

    Raises:
        InputTypeError: the model is no torch.nn.Module.
    """
    for module in unwrapped(model).modules():
        kind: Any = _own_class(module)
        if kind in _layers():
            forget_own_forward(module)
            module.__class__ = _with_class(type(module), kind.timm_class)
            memo.forget(module)
    clear_weight_cache()
    return model


def refresh(model: nn.Module) -> None:
    """Forget all that inference on the CPU keeps of a model's weights, and the graphs of a graphed
    model; they are made anew when needed.

    After edits that PyTorch does not count, or any edit under `settings.weights = "frozen"`.

    Raises:
        InputTypeError: the model is no torch.nn.Module.
    """
    for module in unwrapped(model).modules():
        memo.forget(module)
        graphs.forget(module)
        forget_tables(module)
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None:
                CACHE.forget(t)


def create_model(model_name: str, **timm_kwargs: Any) -> nn.Module:
    """`timm.create_model(model_name, **timm_kwargs)`, swapped.

    Raises:
        RuntimeError: timm knows no model of this name.
    """
    model = timm.create_model(model_name, **timm_kwargs)
    swap(model)
    return model


def _decide(
    path: str, module: nn.Module, chosen: _Selection, fused: set[int]
) -> Swapped | Skipped | None:
    """What becomes of one module; None where vitfast has nothing to say about it.

    fused: ids of the tensors that plans of modules above hold; those of this one's are added.
    """
    kind: type[Any] = _own_class(module)
    if kind in _layers():
        return _swapped(path, kind, module, _plan(kind, module), fused)
    known = layer_table().get(kind) or gap_table().get(kind)
    plan = _plan(known, module) if isinstance(known, type) else None
    unsupported = isinstance(plan, Unsupported)
    if known is None or (known in _by_shape() and unsupported):
        return _unknown(path, kind)
    refusal = chosen.refusal(path)
    if refusal:
        return Skipped(path, kind.__name__, known.role, refusal, by_choice=True)
    if isinstance(known, Gap) or unsupported:
        read = {id(p) for p in module.parameters()}
        if read and read <= fused:  # its block computes what it would
            return None
        reason = known.reason if isinstance(known, Gap) else str(plan)
        return Skipped(path, kind.__name__, known.role, reason)
    return _swapped(path, known, module, plan, fused)


def _swapped(
    path: str, layer: type[Layer], module: nn.Module, plan: object, fused: set[int]
) -> Swapped:
    """The entry of a module that runs `layer`, whose `_plan` is given; `fused` as in `_decide`."""
    note = ""
    if not isinstance(plan, Unfit):
        fused.update(id(t) for t in tensors_in((plan,)))
        note = "; ".join(describe_called(plan))
    elif any(type(p).__name__ == "DTensor" for p in module.parameters()):
        note = "fused where its sharded weights are gathered for its forward, as by fully_shard"
    else:
        note = f"{AS_TIMM}: {plan}"
    if not note.startswith(AS_TIMM):
        first = next(module.parameters(), None)
        note = ("" if first is None or first.is_meta else note_of_distrust(layer, first)) or note
    return Swapped(path, layer.timm_class.__name__, _layers()[layer], layer.role, note)


def note_of_distrust(layer: type[Layer], like: torch.Tensor) -> str:
    """The note of a layer whose ops have no kernels for a tensor like this; "" if they have."""
    why = untrusted(layer.ops, like)
    return f"{UNTRUSTED}{why}" if why else ""


def _plan(layer: type[Layer], module: nn.Module) -> object:
    """What a fused forward would use, or the Unfit that says why timm's would run."""
    try:
        return planned(layer.plan, module)
    except Unfit as reason:
        return type(reason)(str(reason))  # without a traceback, whose frames hold the model


def _no_kernels() -> str:
    """Why neither the CPU's nor the GPU's kernels can run in this process; "" where one can."""
    why = native.reasons() and triton.available() and [*native.reasons(), *triton.available()]
    return "; ".join(dict.fromkeys(why))


def _own_class(module: nn.Module) -> type[Any]:
    """Its class, that beneath where torch.distributed (fully_shard, replicate) or `graphed` put one
    over it."""
    kind = graphs.beneath(type(module))
    return kind.__bases__[1] if _is_distributed(kind) else kind


def _is_distributed(kind: type[Any]) -> bool:
    """Whether this is a class such as FSDPBlock(FSDPModule, Block), made as the program ran."""
    if len(kind.__bases__) != 2:
        return False
    over, own = kind.__bases__
    named = kind.__name__ in (f"FSDP{own.__name__}", f"Replicate{own.__name__}")
    return named and over.__module__.startswith("torch.distributed.")


def _with_class(kind: type[Any], own: type[Any]) -> type[Any]:
    """`own`, with what torch.distributed and `graphed` put over `kind` put over it."""
    if graphs.beneath(kind) is not kind:
        return graphs.over(_with_class(graphs.beneath(kind), own), graphs.methods_of(kind))
    if not _is_distributed(kind):
        return own
    over, was = kind.__bases__
    _MADE[over, was] = kind
    if (over, own) not in _MADE:
        name = kind.__name__.removesuffix(was.__name__) + own.__name__
        names = ("__module__", "__deepcopy__")
        _MADE[over, own] = type(name, (over, own), {n: getattr(kind, n) for n in names})
    return _MADE[over, own]


_MADE: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _unknown(path: str, kind: type[Any]) -> Skipped | None:
    """The entry of an unknown class that has a known one among its bases, else None."""
    known: Any
    base: Any
    for base in kind.__mro__[1:]:
        known = base if base in _layers() else layer_table().get(base) or gap_table().get(base)
        if known is not None and known not in _by_shape():
            what = "overrides forward" if kind.forward is not base.forward else "is not timm's own"
            return Skipped(path, kind.__name__, known.role, f"subclass of {base.__name__} {what}")
    return None


@functools.cache
def _layers() -> dict[type[Layer], str]:
    """Drop-in class -> the name under which users import it."""
    public = {getattr(layers, name): f"vitfast.layers.{name}" for name in layers.__all__}
    return {layer: public[layer] for layer in layer_table().values()}


@functools.cache
def _by_shape() -> set[object]:
    """Drop-in classes of which a module counts as known only where its plan can be read."""
    return {layer for layer in _layers() if layer.by_shape}


class _Selection:
    """Which paths `only` and `skip` leave in play."""

    def __init__(self, model: nn.Module, only: Choice | None, skip: Choice | None) -> None:
        modules = dict(model.named_modules())
        self.only = None if only is None else _matched("only", only, modules)
        self.skip = set() if skip is None else _matched("skip", skip, modules)
        self.above_skip = {parent for path in self.skip for parent in _parents(path)}

    def refusal(self, path: str) -> str:
        """Why the user does not want this module swapped; "" where they do."""
        if path in self.skip:
            return "named in skip"
        if self.only is not None and path not in self.only:
            return "not in only"
        return "a child of it is named in skip" if path in self.above_skip else ""


def _matched(what: str, choice: Choice, modules: dict[str, nn.Module]) -> set[str]:
    """The paths that match, and those below them."""
    choices: list[Any] = [choice]
    if isinstance(choice, Iterable) and not isinstance(choice, (str, type)):
        choices = list(choice)
    found: set[str] = set()
    for item in choices:
        if isinstance(item, str):
            hits = set(fnmatch.filter(modules, item))
        elif isinstance(item, type):
            hits = {
                path
                for path, module in modules.items()
                if isinstance(module, item)
                or issubclass(layer_table().get(_own_class(module), object), item)
            }
        else:
            raise InputTypeError(f"{what}: expected path patterns or classes, got {item!r}")
        if not hits:
            name = item if isinstance(item, str) else item.__name__
            raise InputValueError(f"{what}: {name!r} matches no module of this model")
        found |= hits
    return {path for path in modules if path in found or not found.isdisjoint(_parents(path))}


def _parents(path: str) -> Iterator[str]:
    """The paths of the modules that a module lies in, the model itself ("") left out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


class _CallableModule(ModuleType):
    """`vitfast.swap` is this file as well as the function; both ways of calling it work."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> SwapReport:
        return swap(model, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
