"""torch.fx traces a swapped model wherever it traces timm's, as timm's feature extractors do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models._features_fx import create_feature_extractor
from torch import fx, nn

from vitfast.families import Family, families
from vitfast.swap import swap

# Family -> options that make its sample small.
SMALL: dict[str, dict[str, Any]] = {
    "vit": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
    "eva": dict(depth=2, embed_dim=48, num_heads=3, img_size=28),
    "naflex": dict(depth=2, embed_dim=48, num_heads=3),
    "beit": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
    "relpos": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
    "hybrid": dict(depth=2, embed_dim=48, num_heads=3, img_size=64),
    "convnext": dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 40)),
    "swin": dict(depths=(2, 1, 2, 1), embed_dim=24),
    "swin_v2": dict(depths=(2, 1, 2, 1), embed_dim=24),
    "swin_v2_cr": dict(depths=(2, 1, 2, 1), embed_dim=24),
    "davit": dict(depths=(1, 1, 2, 1)),
}
# No model of its own, or one that timm in this version lacks, is no sample.
SAMPLED = [f for f in families() if timm.is_model(f.sample)]


class Images(nn.Module):
    """A model of one argument: others, None by default, are no proxies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Tracer(fx.Tracer):
    """With the leaves of timm's tracer."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        leaves = tuple(get_notrace_modules())
        return isinstance(m, leaves) or super().is_leaf_module(m, qualname)


def trace(model: nn.Module) -> fx.GraphModule:
    root = Images(model)
    return fx.GraphModule(root, Tracer().trace(root))


def sample(family: Family) -> tuple[nn.Module, torch.Tensor]:
    options = SMALL.get(family.name, {})
    model = timm.create_model(family.sample, num_classes=7, **options).eval()
    size = options.get("img_size") or model.default_cfg["input_size"][-1]
    return model, torch.randn(1, 3, size, size)


@pytest.mark.parametrize("family", SAMPLED, ids=[f.name for f in SAMPLED])
@torch.no_grad()
def test_a_swapped_model_is_traced_where_timms_is(family):
    torch.manual_seed(0)
    model, x = sample(family)
    ours = copy.deepcopy(model)
    swap(ours)
    try:
        trace(model)
    except Exception as error:
        pytest.skip(f"timm's own is not: {error}")
    want = model(x)
    for training in (True, False):  # the last is compared: it drops no paths and keeps its norms
        traced = trace(ours.train(training))
    torch.testing.assert_close(traced(x), want, rtol=1e-4, atol=1e-5)


def test_every_family_but_the_rest_is_traced():
    assert {f.name for f in families()} - {f.name for f in SAMPLED} <= {"other", "naflex"}


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
@torch.no_grad()
def test_timms_feature_extractor_takes_a_swapped_model(name):
    torch.manual_seed(0)
    model, x = sample(next(f for f in families() if f.name == name))
    (want,) = create_feature_extractor(model, {"layers.1": "found"})(x).values()
    swap(model)
    (got,) = create_feature_extractor(model, {"layers.1": "found"})(x).values()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
