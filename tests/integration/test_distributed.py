"""DistributedDataParallel and FSDP2 around a swapped model: two processes on gloo."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import vitfast

STEPS = 3


def make_model(swapped: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5
    ).train()
    if swapped:
        assert vitfast.swap(model).counts["blocks_swapped"] == 2
    return model


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 32, 32, generator=g), torch.randint(5, (4,), generator=g)


def train(model: torch.nn.Module, rank: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        images, labels = batch(rank, step)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank: int, how: str):
    """The losses of timm's model (False) and of the swapped one (True), and if an op "ran"."""
    found = {}
    for swapped in (False, True):
        model = make_model(swapped)
        if how == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        found[swapped] = train(model, rank)
        if swapped:
            picked = vitfast.ops.spec_of("mlp").dispatcher.picked
            found["ran"] = picked is not None
    return found


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_follow_timm(how, in_ranks):
    """Same losses, step by step, as timm's model under the same wrapper."""
    found = in_ranks(work, how)
    for rank in found:
        assert found[rank]["ran"], "the swapped model never reached an op of vitfast"
        assert found[rank][True] == pytest.approx(found[rank][False], rel=1e-4)
    assert found[0][True] != found[1][True]
