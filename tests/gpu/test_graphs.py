"""vitfast.graphed on a GPU: the same bits as the model, from other streams and threads, in little
memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import vitfast
from vitfast.graphs import beneath, explain

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["auto", "triton"])
def model(request, monkeypatch):
    monkeypatch.setattr(vitfast.settings, "backend", request.param)
    torch.manual_seed(0)
    found = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=128, depth=3, num_heads=2, num_classes=10
    )
    vitfast.swap(found)
    return vitfast.graphed(found.cuda().eval())


def images(seed: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()


def right(model, x: torch.Tensor) -> bool:
    return torch.equal(model(x), beneath(type(model)).forward(model, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replays(model, mode, dtype):
    with mode():
        for seed in range(4):
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                assert right(model, images(seed)) and right(model, images(seed, 3))
            model.head.weight.mul_(1.5)
    assert explain(model).count("a graph, replayed 3 times") == 2


def test_streams_and_threads(model):
    wrong = []

    def work(seed: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for step in range(20):
                if not right(model, images(100 * seed + step, 1 + step % 3)):
                    wrong.append((seed, step))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread did
    assert wrong == []


def test_what_cannot_be_captured_leaves_the_device_usable(model):
    own = model.head.forward
    model.head.forward = lambda x: own(x) if x.sum() > 0 else own(-x)
    with torch.no_grad():
        assert right(model, images(0))
        with pytest.warns(RuntimeWarning, match="runs without a graph"):
            assert right(model, images(0))
        assert right(model, images(1))
        del model.head.forward
        for seed in range(3):
            assert right(model, images(seed, 2))
    assert "a graph" in explain(model)


def test_memory_is_bounded(model):
    with torch.no_grad():
        for batch in range(1, 40):
            for _ in range(2):
                model(images(0, batch))
        torch.cuda.synchronize()
        many = torch.cuda.memory_reserved()
        vitfast.ungraphed(model)
        torch.cuda.empty_cache()
        assert many - torch.cuda.memory_reserved() < 512 << 20
