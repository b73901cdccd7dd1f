"""DistributedDataParallel and FSDP2 around a swapped model: two processes on gloo."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

import vitfast

STEPS, WORLD = 3, 2


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


def work(rank: int, how: str, store: str, results) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this machine's name resolves to
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    for swapped in (False, True):
        model = make_model(swapped)
        if how == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (WORLD,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        found[swapped] = train(model, rank)
        if swapped:
            picked = vitfast.ops.spec_of("mlp").dispatcher.picked
            found["ran"] = picked is not None
    results[rank] = found
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_follow_timm(how, tmp_path, monkeypatch):
    """Same losses, step by step, as timm's model under the same wrapper."""
    # The processes import this module by its name; vitfast from where it is installed.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (how, str(tmp_path / "store"), results), nprocs=WORLD, join=True)
        found = dict(results)
    for rank in range(WORLD):
        assert found[rank]["ran"], "the swapped model never reached an op of vitfast"
        assert found[rank][True] == pytest.approx(found[rank][False], rel=1e-4)
    assert found[0][True] != found[1][True]
