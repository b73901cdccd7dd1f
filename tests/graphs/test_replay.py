"""Which calls of a graphed model are replayed, and that a replay gives what the model would."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import vitfast
from tests.graphs.models import capture, images, plain, same, vit
from vitfast.graphs import explain, store
from vitfast.settings import settings

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


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
