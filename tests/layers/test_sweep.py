"""Whatever timm's forward reads from a module or calls in it, the drop-in honours.

For every drop-in: what timm's forward touches is recorded, then each of it is changed, one thing at
a time, in a module that has run before: attributes, parameters and buffers get other values,
methods are replaced on the instance, children get hooks of every kind or give way to look-alikes
that compute something else. The swapped module has to give timm's result or raise where timm does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.sweep_cases import CASES
from vitfast.families import layer_table
from vitfast.settings import settings
from vitfast.swap import swap


@functools.cache
def own_methods(kind: type) -> frozenset[str]:
    """Names of the functions that a module class adds to nn.Module's."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return frozenset(
        name
        for base in bases
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("__") and not isinstance(value, type)
    ) - {"forward", "extra_repr"}


@contextlib.contextmanager
def recording(root: nn.Module, seen: set[tuple[str, str]]) -> Iterator[None]:
    """What is asked of the modules in `root`, as (path, name); "()" where a module is called."""
    kinds = {path: type(module) for path, module in root.named_modules()}

    def spy(path: str, kind: type) -> type:
        def getattribute(self: nn.Module, name: str) -> Any:
            state = object.__getattribute__(self, "__dict__")
            held = (state, state["_parameters"], state["_buffers"], state["_modules"])
            if any(name in names for names in held) or name in own_methods(kind):
                seen.add((path, name))
            return kind.__getattribute__(self, name)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.add((path, "()"))
            return kind.__call__(self, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__getattribute__": getattribute, "__call__": call})

    for path, module in root.named_modules():
        module.__class__ = spy(path, kinds[path])
    try:
        yield
    finally:
        for path, module in root.named_modules():
            module.__class__ = kinds[path]


IN_A_BLOCK = re.compile(r"blocks\.\d+\.")
Change = Callable[[nn.Module], None]
WORDS = {"none": "tanh", "tanh": "none", "zeros": "reflect", "first": "last"}


def other_value(value: Any) -> Any:
    """A value unlike this one that timm might take as well; None where there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.05
    if isinstance(value, str):
        return WORDS.get(value)
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        return tuple(v + 1 for v in value)
    return None


def scaled(result: Any) -> Any:
    return result * 1.5 if isinstance(result, torch.Tensor) else result


def noised(t: torch.Tensor) -> torch.Tensor:
    if t.dtype == torch.bool:
        return ~t
    if not t.is_floating_point():
        return t.flip(0)
    return t + torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) * 0.3


def set_tensor(module: nn.Module, name: str, of: str) -> None:
    old = getattr(module, of)[name]
    new = noised(old.detach())
    getattr(module, of)[name] = nn.Parameter(new) if of == "_parameters" else new


@torch.no_grad()
def edit_tensor(module: nn.Module, name: str, of: str) -> None:
    old = getattr(module, of)[name]
    old.copy_(noised(old))


def without(module: nn.Module, name: str) -> None:
    module._parameters[name] = None


def replace_method(module: nn.Module, name: str) -> None:
    found = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: scaled(found(*args, **kwargs)))


def changes_of(module: nn.Module, name: str) -> Iterator[tuple[str, Change]]:
    """The changes to one thing that timm's forward asks of a module."""
    for of in ("_parameters", "_buffers"):
        held = getattr(module, of)
        if name in held and held[name] is not None:
            yield "other", partial(set_tensor, name=name, of=of)
            if held[name].is_floating_point():
                yield "edited", partial(edit_tensor, name=name, of=of)
            if of == "_parameters":
                yield "None", partial(without, name=name)
    state = module.__dict__
    if name in own_methods(type(module)):
        yield "method", partial(replace_method, name=name)
    elif name in state and not name.startswith("_"):
        if callable(state[name]):
            yield "function", partial(replace_method, name=name)
        other = other_value(state[name])
        if other is not None:
            yield f"= {other}", lambda m: setattr(m, name, other)


def look_alike(parent: nn.Module, name: str) -> None:
    child = parent._modules[name]
    kind = type(child)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return scaled(kind.forward(self, *args, **kwargs))

    twin = copy.copy(child)
    twin.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})
    parent._modules[name] = twin


def instance_forward(child: nn.Module) -> None:
    found = child.forward
    child.forward = lambda *args, **kwargs: scaled(found(*args, **kwargs))


HOOKS: dict[str, Change] = {
    "forward hook": lambda m: m.register_forward_hook(lambda _, args, out: scaled(out)),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: tuple(map(scaled, args))),
    "backward hook": lambda m: m.register_full_backward_hook(
        lambda _, inputs, outputs: tuple(g if g is None else g * 1.5 for g in inputs)
    ),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(
        lambda _, outputs: tuple(g if g is None else g * 1.5 for g in outputs)
    ),
    "own forward": instance_forward,
}


def changes(root: nn.Module, seen: set[tuple[str, str]]) -> Iterator[tuple[str, Change]]:
    """Every single change to what was seen, with a name; each takes the root."""
    for path, name in sorted(seen):
        if IN_A_BLOCK.search(path):
            continue  # which has a case of its own
        module = root.get_submodule(path)
        if name == "()":
            if not path:
                continue
            above, _, last = path.rpartition(".")
            for kind, hook in HOOKS.items():
                yield f"{kind} on {path}", lambda r, p=path, h=hook: h(r.get_submodule(p))
            yield (
                f"another {path}",
                lambda r, a=above, n=last: look_alike(r.get_submodule(a), n),
            )
            continue
        for kind, change in changes_of(module, name):
            where = f"{path}.{name}".lstrip(".")
            yield f"{where} {kind}", lambda r, p=path, c=change: c(r.get_submodule(p))


def outcome(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], training: bool, grad: bool
) -> dict[str, torch.Tensor] | None:
    """Output and gradients by name; None where the call raises."""
    args = tuple(a.detach().requires_grad_(grad and a.is_floating_point()) for a in args)
    torch.default_generator.manual_seed(7)  # stochastic depth; torch.manual_seed takes longer
    try:
        with torch.set_grad_enabled(grad):
            out = module(*args, **kwargs)
            found = {"output": out}
            if grad:
                wanted = dict(module.named_parameters()) | {"input": args[0]}
                loss = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
                grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                named = zip(wanted, grads, strict=True)
                found |= {f"gradient of {n}": g for n, g in named if g is not None}
    except Exception:
        return None
    return {n: t.detach() for n, t in found.items()}


def difference(got: dict[str, torch.Tensor] | None, want: dict[str, torch.Tensor] | None) -> str:
    """What is wrong with what the drop-in gave; "" if nothing."""
    if got is None or want is None:
        return "" if got is want else "raises" if got is None else "does not raise"
    if got.keys() != want.keys():
        return f"has {sorted(got.keys() ^ want.keys())} too much or too little"
    scale = max((t.abs().max().item() for t in want.values()), default=1.0)
    for name, t in want.items():
        if got[name].shape != t.shape or got[name].dtype != t.dtype:
            return f"{name}: {got[name].shape} {got[name].dtype}, not {t.shape} {t.dtype}"
        bar = 1e-4 * max(t.abs().max().item(), 1e-3 * scale) + 1e-6
        off = (got[name] - t).abs().max().item()
        if not off <= bar and not torch.equal(got[name].isnan(), t.isnan()):
            return f"{name}: NaN"
        if off > bar:
            return f"{name}: off by {off:.2g} of {t.abs().max().item():.2g}"
    return ""


def built(case: str, lively: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, tuple, dict]:
    torch.manual_seed(0)
    make, inputs, kwargs = CASES[case]
    module = lively(make())
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module, inputs(), kwargs


MODES = {"inference": (False, False), "training": (True, True)}


def refused() -> tuple[str, ...]:
    """How changes end that torch refuses in training and we need not: a ReLU in place; and, in
    torch 2.11, the backward of a group norm with a bias and no weight."""
    try:
        bias = torch.ones(2, requires_grad=True)
        F.group_norm(torch.ones(1, 2, 3), 2, None, bias).sum().backward()
    except RuntimeError:
        return "inplace = True", "weight None"
    return ("inplace = True",)


REFUSED = refused()


@pytest.mark.parametrize("case", CASES)
def test_every_change_is_honoured(lively, case, monkeypatch):
    theirs, args, kwargs = built(case, lively)
    if case.endswith(("stage", "stages")):
        monkeypatch.setattr(settings, "memory", "low")  # at this size too
    seen: set[tuple[str, str]] = set()
    spied = copy.deepcopy(theirs)
    with recording(spied, seen):
        for training, grad in MODES.values():
            assert outcome(spied.train(training), args, kwargs, training, grad) is not None
    before = {
        mode: outcome(theirs.train(training), args, kwargs, training, grad)
        for mode, (training, grad) in MODES.items()
    }
    wrong, told = [], 0
    for what, change in changes(theirs, seen):
        for mode, (training, grad) in MODES.items():
            changed, ours = (copy.deepcopy(theirs).train(training) for _ in range(2))
            swap(ours)
            for _ in range(1 if grad else 3):
                outcome(ours, args, kwargs, training, grad)
            changed.load_state_dict(ours.state_dict())  # statistics of batches
            change(changed)
            change(ours)
            want = outcome(changed, args, kwargs, training, grad)
            told += bool(difference(want, before[mode]))
            for call in range(1 if grad else 3):
                why = difference(outcome(ours, args, kwargs, training, grad), want)
                if why and not (what.endswith(REFUSED) and why == "does not raise"):
                    wrong.append(f"{what} ({mode}, call {call + 1}): {why}")
                    break
    assert told >= 3  # the changes do change something
    assert not wrong, "\n".join(wrong)


def test_every_drop_in_is_swept():
    swept = {type(m) for make, *_ in CASES.values() for m in make().modules()}
    assert {kind.__name__ for kind in layer_table()} <= {kind.__name__ for kind in swept}
    assert set(layer_table()) <= swept
