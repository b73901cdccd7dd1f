"""Swapped models on a GPU: training beside timm, and CUDA graphs of inference and training."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import vitfast

pytestmark = pytest.mark.gpu
STEPS = 12


@pytest.fixture(scope="module")
def pair():
    """The same ViT twice: as timm made it, and swapped."""
    torch.manual_seed(0)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=128, depth=3, num_heads=2, num_classes=10,
        init_values=0.1, drop_path_rate=0.2,
    ).cuda()  # fmt: skip
    swapped = copy.deepcopy(plain)
    vitfast.swap(swapped)
    return plain, swapped


@pytest.fixture(params=["auto", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setattr(vitfast.settings, "backend", request.param)


def images(batch: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()


def losses(model, dtype, scaler):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    torch.manual_seed(1)
    found = []
    for step in range(STEPS):
        with torch.autocast("cuda", dtype):
            out = model(images(seed=step))
        loss = torch.nn.functional.cross_entropy(out.float(), torch.arange(8, device="cuda"))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_follow_timm(pair, dtype):
    theirs, ours = (
        losses(m, dtype, torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)) for m in pair
    )
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert ours[-1] < ours[0]


@pytest.mark.usefixtures("backend")
def test_inference_in_a_cuda_graph(pair):
    model = copy.deepcopy(pair[1]).eval()
    x = images()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(images(seed=7))
        graph.replay()
        torch.testing.assert_close(out, model(x), rtol=0, atol=0)


@pytest.mark.usefixtures("backend")
def test_training_in_a_cuda_graph(pair, monkeypatch):
    """Without DropPath, whose numbers a graph replays from its own generator state."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = copy.deepcopy(pair[1]).eval()
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (images(),))
    x = images(seed=7)
    for run in (eager, graphed):
        run(x).square().mean().backward()
    for (name, want), got in zip(eager.named_parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0, msg=name)
