"""Which calls of a graphed model are replayed, and that a replay gives what the model would."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast.graphs import beneath, explain, store
from vitfast.settings import settings

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def images(batch: int = 2, seed: int = 0, size: int = 32, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(**options)


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=10,
        **options,
    ).eval()  # fmt: skip


def plain(model: nn.Module, *args, method: str = "forward", **kwargs):
    """What the model's own method gives."""
    return getattr(beneath(type(model)), method)(model, *args, **kwargs)


def same(got: object, want: object) -> bool:
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    return True


def capture(model: nn.Module, *args, **kwargs) -> None:
    """The calls after which there is a graph."""
    model(*args, **kwargs)
    model(*args, **kwargs)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("swapped", [False, True], ids=["timm's", "swapped"])
def test_a_replay_gives_what_the_model_does(fake, mode, swapped):
    model = vit()
    if swapped:
        vitfast.swap(model)
    assert vitfast.graphed(model) is model
    with mode():
        for step in range(4):
            x = images(seed=step)
            # A capture sees timm's ops, since a mode watches; the other calls of a swapped model
            # are fused.
            torch.testing.assert_close(model(x), plain(model, x), rtol=1e-5, atol=1e-5)
            assert fake.count("capture") == min(step, 1)
            assert fake.count("replay") == step
    assert fake.count("warm up") == 3
    assert explain(model) == "forward((float32[2, 3, 32, 32]), {}): a graph, replayed 3 times"


@pytest.mark.usefixtures("no_grad")
def test_a_replay_runs_no_python(fake):
    model = vit()
    calls = []
    head = model.head
    model.head = type(
        "Counting", (nn.Module,), {"forward": lambda s, x: calls.append(1) or head(x)}
    )()
    vitfast.graphed(model.eval())
    capture(model, images())
    seen = len(calls)
    for seed in range(3):
        model(images(seed=seed))
    assert len(calls) == seen


def _autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(images())


def _inference_mode(model):
    with torch.inference_mode():
        return model(images())


def _backend(model):
    settings.backend = "reference"
    return model(images())


def _deterministic(model):
    torch.use_deterministic_algorithms(True)
    try:
        return model(images())
    finally:
        torch.use_deterministic_algorithms(False)


OTHER_KINDS = {
    "batch": lambda model: model(images(3)),
    "strides": lambda model: model(images(memory_format=torch.channels_last)),
    "argument": lambda model: model(images(), attn_mask=None),
    "autocast": _autocast,
    "inference mode": _inference_mode,
    "backend": _backend,
    "deterministic": _deterministic,
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("other", OTHER_KINDS)
def test_another_kind_of_call_has_another_graph(fake, other):
    model = vitfast.graphed(vit())
    capture(model, images())
    assert fake.log[-1] == "replay"
    replays = fake.count("replay")
    first = OTHER_KINDS[other](model)
    assert fake.count("replay") == replays
    again = OTHER_KINDS[other](model)
    assert fake.count("capture") == 2 and fake.count("replay") == replays + 1
    assert same(again, first)


@pytest.mark.usefixtures("no_grad")
def test_another_dtype_has_another_graph(fake):
    class Scale(nn.Module):
        def forward(self, x):
            return x * 2

    model = vitfast.graphed(Scale().eval())
    for dtype in (torch.float32, torch.float64, torch.int32):
        capture(model, torch.ones(3, dtype=dtype))
        assert model(torch.ones(3, dtype=dtype)).dtype == dtype
    assert fake.count("capture") == 3


class Scaled(nn.Module):
    """Takes and gives containers and constants."""

    def forward(self, x, factor=1, *, others=()):
        total = x * factor + sum(o["t"] for o in others)
        return {"total": total, "parts": [x, total], "factor": factor}


@pytest.mark.usefixtures("no_grad")
def test_containers_and_constants(fake):
    model = vitfast.graphed(Scaled().eval())
    for factor in (1, 2, 1.0, True):
        for seed in range(3):
            x, other = images(seed=seed), {"t": images(seed=seed + 9)}
            got = model(x, factor, others=[other])
            want = plain(model, x, factor, others=[other])
            assert got["factor"] is factor and same(got["total"], want["total"])
            assert same(got["parts"], want["parts"])
            assert got["parts"][1] is got["total"]
    assert fake.count("capture") == 4  # 1, 1.0 and True are equal and not the same


@pytest.mark.usefixtures("no_grad")
def test_results_are_the_callers(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    first = model(images(seed=1))
    want = first.clone()
    second = model(images(seed=2))
    assert same(first, want) and first.data_ptr() != second.data_ptr()
    first.fill_(7)
    assert same(model(images(seed=2)), second)


@pytest.mark.usefixtures("no_grad")
def test_without_clones_the_next_call_overwrites(fake):
    model = vitfast.graphed(vit(), clone_outputs=False)
    capture(model, images())
    first = model(images(seed=1))
    second = model(images(seed=2))
    assert first.data_ptr() == second.data_ptr() and same(first, plain(model, images(seed=2)))


@pytest.mark.usefixtures("no_grad")
def test_no_more_graphs_than_the_limit(fake):
    model = vitfast.graphed(vit(), limit=2)
    for batch in (1, 2, 3, 4):
        capture(model, images(batch))
        assert len(fake.graphs) == min(batch, 2)
    replays = fake.count("replay")
    model(images(3))  # which now was called last
    capture(model, images(5))
    model(images(3))
    assert fake.count("replay") == replays + 3
    model(images(4))
    assert fake.count("replay") == replays + 3  # it had to go


@pytest.mark.usefixtures("no_grad")
def test_shapes_that_there_is_no_room_for_are_not_captured_in_each_call(fake):
    model = vitfast.graphed(vit(), limit=2)
    for _ in range(20):
        for batch in (1, 2, 3):
            model(images(batch))
    assert fake.count("capture") <= 12


@pytest.mark.usefixtures("no_grad")
def test_what_is_known_of_kinds_is_bounded(fake, monkeypatch):
    monkeypatch.setattr(store, "_MOST_KINDS", 4)
    model = vitfast.graphed(Scaled().eval(), limit=2)
    for factor in range(20):
        model(torch.ones(2), factor)
    assert len(model.__dict__["_vitfast_graphs"]._kinds) <= 6


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def _recorded(model, x):
    with torch.enable_grad():
        out = model(x)
    assert out.requires_grad


def _input_with_gradient(model, x):
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.enable_grad():
        assert model(x.clone().requires_grad_()).requires_grad


def _watched(model, x):
    with _Watching():
        model(x)


def _with_global_hook(model, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    try:
        model(x)
    finally:
        handle.remove()
    assert len(seen) > 10


def _training(model, x):
    model.train()
    model(x)
    model.eval()


def _compiled(model, x):
    assert same(torch.compile(model, backend="eager", fullgraph=True)(x), plain(model, x))


def _traced(model, x):
    traced = torch.jit.trace(model, x, check_trace=False)
    assert same(traced(x), plain(model, x))


def _exported(model, x):
    assert same(torch.export.export(model, (x,)).module()(x), plain(model, x))


PLAIN_CALLS = {
    "recorded by autograd": _recorded,
    "input with gradient": _input_with_gradient,
    "watched": _watched,
    "global hook": _with_global_hook,
    "training": _training,
    "compiled": _compiled,
    "traced": _traced,
    "exported": _exported,
    "vmap": lambda model, x: torch.vmap(model)(x[None]),
    "subclass": lambda model, x: model(x.as_subclass(_Subclass)),
    "elsewhere": lambda model, x: copy.deepcopy(model).to("meta")(x.to("meta")),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("how", PLAIN_CALLS)
def test_what_a_graph_cannot_do_is_called_as_ever(fake, how):
    model = vitfast.graphed(vit())
    capture(model, images())
    log = list(fake.log)
    for _ in range(3):
        PLAIN_CALLS[how](model, images())
    assert fake.log == log


@pytest.mark.usefixtures("no_grad")
def test_another_capture_is_left_alone(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    log = list(fake.log)
    fake.capturing = True
    model(images())
    fake.capturing = False
    with store._CAPTURING:  # of another model's
        for _ in range(3):
            model(images(5))
    assert fake.log == log
    model(images(5))
    assert fake.count("capture") == 2


def test_without_gradients_to_record_grad_mode_may_be_on(fake):
    model = vitfast.graphed(vit().requires_grad_(False))
    capture(model, images())
    assert fake.count("replay") == 1
    model.head.weight.requires_grad_()
    assert model(images()).requires_grad and fake.count("replay") == 1
    model.head.weight.requires_grad_(False)
    model(images())
    assert fake.count("replay") == 2


class Deciding(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Writing(nn.Module):
    def forward(self, x):
        return x.add_(1) * 2


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Opaque(nn.Module):
    def forward(self, x):
        return iter([x + 1])


CANNOT = {
    "decides by values": (Deciding(), "not permitted when stream is capturing"),
    "writes to its input": (Writing(), "writes to its inputs"),
    "changes itself": (Counting(), "its forward changes the model"),
    "gives something else": (Opaque(), "its result holds a builtins.list_iterator"),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_captured_warns_once_and_is_called_as_ever(fake, what):
    module, why = CANNOT[what]
    model = vitfast.graphed(module.eval())
    model(torch.ones(3))
    with pytest.warns(RuntimeWarning, match=why) as told:
        model(torch.ones(3))
    assert len(told) == 1
    captures = fake.count("capture")
    for _ in range(600):
        model(torch.ones(3))
    assert fake.count("capture") == captures and fake.count("replay") == 0
    assert why in explain(model)


@pytest.mark.usefixtures("no_grad")
def test_decisions_by_values_stay_right(fake):
    model = vitfast.graphed(Deciding().eval())
    model(torch.ones(3))
    with pytest.warns(RuntimeWarning):
        model(torch.ones(3))
    assert same(model(-torch.ones(3)), -2 * torch.ones(3))


@pytest.mark.usefixtures("no_grad")
def test_a_capture_that_fails(fake):
    model = vitfast.graphed(vit())
    model(images())
    fake.fail_capture = RuntimeError("CUDA error: operation failed\nmore")
    with pytest.warns(RuntimeWarning, match="CUDA error: operation failed$"):
        assert same(model(images()), plain(model, images()))
    fake.fail_capture = None
    for _ in range(3):
        model(images())
    assert fake.count("capture") == 1
    capture(model, images(3))
    assert fake.count("replay") == 1


@pytest.mark.usefixtures("no_grad")
def test_no_memory_for_a_graph_gives_up_the_others(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    model(images(3))
    fake.fail_capture = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        model(images(3))
    assert len(fake.graphs) == 0


@pytest.mark.usefixtures("no_grad")
def test_a_replay_that_fails(fake):
    model = vitfast.graphed(vit())
    capture(model, images())
    fake.fail_replay = True
    with pytest.warns(RuntimeWarning, match="its replay failed: RuntimeError: CUDA error"):
        assert same(model(images(seed=1)), plain(model, images(seed=1)))
    fake.fail_replay = False
    assert len(fake.graphs) == 0 and same(model(images(seed=2)), plain(model, images(seed=2)))


@pytest.mark.usefixtures("no_grad")
def test_elements_that_share_memory(fake):
    model = vitfast.graphed(vit())
    x = images(1).expand(2, -1, -1, -1)
    model(x)
    with pytest.warns(RuntimeWarning, match="share their memory"):
        assert same(model(x), plain(model, x))
    strided = images(2, size=64)[:, :, ::2, ::2]
    capture(model, strided)
    assert same(model(strided), plain(model, strided)) and fake.count("replay") == 2


@pytest.mark.usefixtures("no_grad")
def test_an_error_is_the_models_own(fake):
    model = vitfast.graphed(vit())
    for _ in range(3):
        with pytest.raises(AssertionError, match="Input height"):
            model(images(size=48))
    assert fake.log == []


def test_autocast_keeps_no_weight_for_a_graph(fake):
    """Cast weights that autocast remembers are gone when it ends, and old when weights change."""
    model = vitfast.graphed(vit())
    with torch.no_grad():
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                plain(model, images())  # fills autocast's cache
                model(images())
                got = model(images(seed=seed))
            with torch.autocast("cpu", torch.bfloat16):
                assert same(got, plain(model, images(seed=seed)))
            model.head.weight.mul_(2)
    assert fake.count("replay") >= 4


def test_threads(fake):
    model = vitfast.graphed(vit())
    wrong = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for step in range(12):
                x = images(1 + step % 2, seed=100 * seed + step)
                if not torch.equal(model(x), plain(model, x)):
                    wrong.append((seed, step))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread did
    assert wrong == [] and fake.count("replay") > 20 and fake.count("capture") == 2


@pytest.mark.usefixtures("no_grad")
def test_features_too(fake):
    model = vitfast.graphed(vit(), methods=("forward", "forward_features", "forward_intermediates"))
    x = images(seed=3)
    for _ in range(3):
        features = model.forward_features(x)
        found = model.forward_intermediates(x, norm=True)
        logits = model(x)
    assert fake.count("capture") == 3
    assert same(features, plain(model, x, method="forward_features"))
    assert same(found, plain(model, x, norm=True, method="forward_intermediates"))
    assert same(logits, plain(model, x))


@pytest.mark.usefixtures("no_grad")
def test_a_graphed_part_of_a_graphed_model(fake):
    model = vit()
    vitfast.graphed(model.blocks)
    vitfast.graphed(model)
    for seed in range(4):
        assert same(model(images(seed=seed)), plain(model, images(seed=seed)))
    assert fake.count("capture") == 2  # the whole, and the part in what `plain` called


def test_no_warning_where_there_is_no_gpu():
    model = vitfast.graphed(vit())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            assert same(model(images(seed=seed)), plain(model, images(seed=seed)))
    assert explain(model) == "no call yet that could have a graph"
