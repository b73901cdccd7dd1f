"""`parity`: a swapped module against timm's own, in outputs and all gradients."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.models import convnext, swin_transformer, swin_transformer_v2
from timm.models.naflexvit import NaFlexVit
from torch import nn
from torch.utils._pytree import tree_leaves

from vitfast.engine import convnext as engine
from vitfast.engine import eligibility
from vitfast.engine import rows as by_rows
from vitfast.families import layer_table
from vitfast.layers import Layer
from vitfast.runtime.dispatch import Dispatcher
from vitfast.settings import settings
from vitfast.swap import swap
from vitfast.testing.errors import compare
from vitfast.testing.inputs import map_tensors, to_float64

KERNELS = {torch.float32, torch.bfloat16}
"""Dtypes of the CPU's kernels."""
CONTAINERS = {
    NaFlexVit,
    convnext.ConvNeXtStage,
    swin_transformer.SwinTransformerStage,
    swin_transformer_v2.SwinTransformerV2Stage,
}
"""Classes whose forward calls drop-ins, and may be timm's for that."""
TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timm(version): needs timm of this version, say 1.0.29")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("timm"):
        if tuple(int(part) for part in marker.args[0].split(".")) > TIMM:
            pytest.skip(f"needs timm {marker.args[0]}, this is {timm.__version__}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are tiny


def lively(module: nn.Module) -> nn.Module:
    """The module with no parameter left at 0, 1 or 1e-6, where a wrong use of it would not show."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("gamma", "gamma_1", "gamma_2")):
                p.uniform_(0.3, 0.9)
            elif p.ndim < 2:
                p.add_(torch.randn(p.shape) * 0.2)
            elif not p.any():
                p.normal_(std=0.5)
    return module


def refusal(message: str) -> Callable[..., None]:
    """A function that raises, and claims to be timm's own: the layers step aside for others."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(MESSAGE)  # noqa: F821

    return types.FunctionType(refuse.__code__, {"__name__": "timm", "MESSAGE": message})


def recorder(found: list[tuple[torch.Tensor, torch.Tensor]]):
    """A forward hook that keeps what goes in and comes out, each beside a copy of it then."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for t in (*inputs, output):
            found.append((t, t.clone()))

    return hook


@contextlib.contextmanager
def timm_forbidden(monkeypatch: pytest.MonkeyPatch, *classes: type) -> Iterator[None]:
    """timm's forward of these classes (all that have a drop-in, by default) raises."""
    with monkeypatch.context() as patch:
        for kind in classes or layer_table():
            if layer_table()[kind].by_shape:  # others of this class are none of ours
                continue
            if kind in CONTAINERS and not classes:
                continue
            if layer_table()[kind].forward is not kind.forward:
                patch.setattr(kind, "forward", refusal(f"timm's {kind.__name__}.forward ran"))
        yield


@contextlib.contextmanager
def ops_picked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the ops that are called within."""
    found: set[str] = set()
    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "_log", lambda dispatcher, name: found.add(dispatcher.op))
        yield found


@contextlib.contextmanager
def by_name(backend: str) -> Iterator[None]:
    """Within, ops run this backend, and layers the ops, whatever the automatic choice would do."""
    before, settings.backend = settings.backend, backend
    try:
        yield
    finally:
        settings.backend = before


def run(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    autocast: torch.dtype | None,
    grad: bool,
    seed: int = 2,
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of parameters and floating inputs, by name.

    `seed` draws the weights of the outputs in the sum that is differentiated.

    Without gradients three calls have to give the same bits: the third may be a replay's.
    """
    given = map_tensors(
        {str(i): a for i, a in enumerate(args)} | kwargs,
        lambda t: t.detach().clone().requires_grad_(grad and t.is_floating_point()),
    )
    torch.manual_seed(1)  # drop_path
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context, torch.set_grad_enabled(grad):
        positional = [given[str(i)] for i in range(len(args))]
        named = {k: given[k] for k in kwargs}
        out = module(*positional, **named)
        for _ in range(0 if grad else 2):
            torch.manual_seed(1)
            again = module(*positional, **named)
            torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    if not grad:
        return {"output": out}
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    inputs = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    wanted = inputs | {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        out, list(wanted.values()), weights.to(out.dtype), allow_unused=True
    )
    gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    return {"output": out.detach()} | gradients


def judge(
    what: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    base: torch.Tensor,
    factor: float,
    zero: bool = False,
    where: Callable[[int], str] = str,
) -> None:
    """The criterion of vitfast.testing.errors, with the same factor for maximum and rms error.

    Not (d): its noise model wants independent errors, and behind several layers those of a row, or
    of a weight's column, have one cause. For gradients not (g), which knows no factor above 2, and
    in bfloat16 not (f), where timm's own errors come near a twentieth; (e) holds there.
    """
    factors = dict(factor=factor, rms_factor=factor)
    report = compare(actual, reference, base, name=what, zero=zero, **factors)
    exempt = ["(d)"]
    if what.startswith("grad"):
        exempt += ["(g)"] if actual.dtype == torch.float32 else ["(f)"]
    wrong = [p for p in report.problems if not p.startswith(tuple(exempt))]
    at = where(report.worst_index[0]) if report.worst_index else ""
    assert not wrong, f"{report}\nworst: {at}"


def vanishing(truth: torch.Tensor) -> bool:
    """Whether a gradient is zero but for rounding: that of a bias which softmax cancels, say."""
    return bool(truth.square().mean().sqrt() < 1e-12)


def judge_vanishing(
    draws: Sequence[tuple[dict[str, torch.Tensor], ...]], working: torch.dtype
) -> None:
    """Each gradient that vanishes, of all draws (actual, reference, base) as one vector.

    There is nothing but noise to compare with noise, often of two elements: one draw of them may
    well be a tenth of the next.
    """
    for name, truth in draws[0][1].items():
        if vanishing(truth):
            parts = zip(*[[t[name].flatten() for t in draw] for draw in draws], strict=True)
            actual, reference, base = map(torch.cat, parts)
            triple = (actual.to(working), reference, base.to(working))
            judge(f"gradient of {name}", *triple, factor=3.0, zero=True)


def judge_gradients(
    actual: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    working: torch.dtype,
) -> None:
    """All gradients as one vector, each scaled to an rms of 1.

    A small tensor's own largest error is a matter of luck; the largest of all is not. Those that
    are `vanishing` are left to `judge_vanishing`.
    """
    vectors: dict[str, list[torch.Tensor]] = {"actual": [], "reference": [], "base": []}
    names = []
    for name, truth in reference.items():
        if vanishing(truth):
            continue
        rms = truth.square().mean().sqrt()
        names += [name] * truth.numel()
        for kind, t in zip(vectors, (actual[name], truth, base[name]), strict=True):
            vectors[kind].append((t.double() / rms).flatten())
    if names:
        whole = {kind: torch.cat(parts) for kind, parts in vectors.items()}
        judge(
            "gradients",
            whole["actual"].to(working),
            whole["reference"],
            whole["base"].to(working),
            factor=3.0,
            where=names.__getitem__,
        )


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """parity(module, *args, **kwargs): swapped copies of a timm module agree with it.

    Outputs within twice timm's own error, gradients within three times: timm in float64 is the
    truth, timm in the working dtype the yardstick. Covers training (autograd) and inference.

    What has no kernels here (float16, say) runs timm's own forward, bit for bit; there the ops'
    references are compared, asked for by name.

    Keywords of its own:
        autocast: dtype; results are compared in it.
        fused: whether timm's forward must not run at all.
        backward: whether to compare gradients.

    Returns:
        the swapped module.
    """

    def check(
        module: nn.Module,
        *args: Any,
        autocast: torch.dtype | None = None,
        fused: bool = True,
        backward: bool = True,
        **kwargs: Any,
    ) -> nn.Module:
        ours = copy.deepcopy(module)
        swap(ours)
        truth = copy.deepcopy(module).double()

        def draw(grad: bool, seed: int = 2) -> tuple[dict[str, torch.Tensor], ...]:
            reference = run(truth, to_float64(args), to_float64(kwargs), None, grad, seed)
            base = run(module, args, kwargs, autocast, grad, seed)
            given = tree_leaves(args)[0].dtype
            if settings.backend == "auto" and not {given, autocast or given} <= KERNELS:
                same = run(ours, args, kwargs, autocast, grad, seed)
                torch.testing.assert_close(same, base, rtol=0, atol=0, equal_nan=True)
                forced: contextlib.AbstractContextManager[None] = by_name("reference")
            else:
                forced = contextlib.nullcontext()
            only = timm_forbidden(monkeypatch) if fused else contextlib.nullcontext()
            with forced, only, ops_picked(monkeypatch) as picked:
                found = run(ours, args, kwargs, autocast, grad, seed)
            if fused and isinstance(ours, Layer):  # or nobody could tell where they are trusted
                called = getattr(ours, "backbone", nn.Identity()).modules()  # each by its own ops
                layers = [type(m) for m in (ours, *called) if isinstance(m, Layer)]
                assert picked <= {op for layer in layers for op in layer.ops}
            return found, reference, base

        for grad in (True, False) if backward else (False,):
            actual, reference, base = results = draw(grad)
            assert actual.keys() == base.keys() == reference.keys()
            assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in base.items()}
            working = autocast or base["output"].dtype
            if working == torch.float64:
                torch.testing.assert_close(actual, base)
                continue
            outputs = [found.pop("output") for found in results]
            outputs[0], outputs[2] = outputs[0].to(working), outputs[2].to(working)
            judge(f"output ({'training' if grad else 'inference'})", *outputs, factor=2.0)
            judge_gradients(*results, working)
            if any(map(vanishing, reference.values())):
                judge_vanishing([results, *(draw(grad, seed) for seed in range(3, 10))], working)
        return ours

    return check


@pytest.fixture
def one_graph(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, torch.Tensor], str]:
    """one_graph(module, x): what inference compiles to, without a break, and computes as module.

    As in a process that has run no layer of the class before.
    """

    def text(module: nn.Module, x: torch.Tensor) -> str:
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        monkeypatch.setattr(eligibility, "_METHODS", {})
        with torch.no_grad():
            got = torch.compile(module, fullgraph=True, backend=backend)(x)
            torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)
        return graphs[0].print_readable(print_output=False)

    return text


@pytest.fixture
def hook_calls() -> Callable[[nn.Module, torch.Tensor, str], int]:
    """hook_calls(module, x, child): how often inference calls a hook on this child of a swapped
    copy, put on after the first call."""

    def count(module: nn.Module, x: torch.Tensor, child: str) -> int:
        ours = copy.deepcopy(module)
        swap(ours)
        calls = []
        with torch.no_grad():
            ours(x)
            ours.get_submodule(child).register_forward_hook(lambda *_: calls.append(1))
            torch.testing.assert_close(ours(x), module(x), rtol=1e-4, atol=1e-5)
        return len(calls)

    return count


@pytest.fixture
def narrow_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that small maps go through convolution and MLP in several parts."""
    monkeypatch.setattr(by_rows, "CHUNK_ROWS", 130)
    monkeypatch.setattr(by_rows, "WHOLE_ROWS", 300)
    monkeypatch.setattr(engine, "_CONVOLVED_BYTES", 0)
    monkeypatch.setattr(engine, "_HIDDEN_BYTES", 0)
    monkeypatch.setattr(engine, "_LEAST_ROWS", 50)


@pytest.fixture(name="lively")
def lively_fixture() -> Callable[[nn.Module], nn.Module]:
    return lively


@pytest.fixture(name="ops_picked")
def ops_picked_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    return lambda: ops_picked(monkeypatch)


@pytest.fixture(name="by_name")
def by_name_fixture() -> Callable[[str], contextlib.AbstractContextManager[None]]:
    return by_name


@pytest.fixture(name="refusal")
def refusal_fixture() -> Callable[[str], Callable[..., None]]:
    return refusal


@pytest.fixture(name="timm_forbidden")
def timm_forbidden_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return lambda *classes: timm_forbidden(monkeypatch, *classes)
