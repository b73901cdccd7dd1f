"""`vitfast swap`: the report of a model that is never run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("a module was called")

    monkeypatch.setattr(nn.Module, "__call__", refuse)


def test_the_report(vitfast, tmp_path):
    path = tmp_path / "swap.json"
    status, out, err = vitfast("swap", "vit_base_patch16_224", "--json", path)
    assert (status, err) == (0, "")
    assert "12 of 12 blocks" in out
    found = json.loads(path.read_text())
    assert found["counts"]["blocks_swapped"] == 12
    assert {e["timm_class"] for e in found["swapped"]} >= {"Block", "Attention", "Mlp"}


def test_a_4k_model_costs_no_memory(vitfast, monkeypatch):
    made = []
    empty = torch.empty

    def watched(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "empty", watched)
    status, out, _ = vitfast("swap", "vit_large_patch16_224", "--img-size", "2160x3840")
    assert status == 0
    assert "24 of 24" in out
    assert made
    assert all(t.is_meta for t in made if t.numel() > 10**6)


@pytest.mark.parametrize(
    "words, message",
    [
        (("vit_bse_patch16_224",), "did you mean"),
        (("vit_base_patch16_224", "--img-size", "x"), "expected a size"),
        (("vit_base_patch16_224", "--json", "/no/such/folder/x"), "there is no folder"),
        ((), "required"),
    ],
)
def test_mistakes(vitfast, words, message):
    status, out, err = vitfast("swap", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
