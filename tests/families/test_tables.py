"""The family tables; every registered model of the families, built without weights and swapped."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import weight_init
from torch import nn

from vitfast import layers
from vitfast.families import NAMES, families, gap_table, layer_table
from vitfast.swap import restore, swap

MODELS = [
    (family.name, name)
    for family in families()
    for file in family.models
    for name in timm.list_models(module=file)
]
# Models with blocks that no drop-in has yet; of all others every block is swapped.
PARTLY = {
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_xp_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_huge_patch14_xp_224",
    "vit_large_patch14_xp_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
    "eva02_enormous_patch14_clip_224",
    "vit_relpos_base_patch16_rpn_224",
    "vit_relpos_base_patch32_plus_rpn_256",
    "vit_relpos_medium_patch16_rpn_224",
    "vit_relpos_small_patch16_rpn_224",
    *timm.list_models(module="edgenext"),
    *timm.list_models(module="davit"),
    *timm.list_models("coatn*", module="maxxvit"),
    *timm.list_models("maxxvit*", module="maxxvit"),
    *timm.list_models(module="hiera"),
    "maxvit_tiny_pm_256",
    "test_coatnet",
}


def test_every_public_layer_is_in_a_family():
    public = {getattr(layers, name) for name in layers.__all__} - {layers.Layer}
    assert public == set(layer_table().values())
    assert len(families()) == len(NAMES) == len({f.name for f in families()})


def test_layers_override_nothing_but_forward():
    allowed = {
        "forward", "plan", "role", "timm_class", "__module__", "__doc__", "__firstlineno__",
        "__static_attributes__", "_accepts", "__annotations__", "by_shape", "ops",
    }  # fmt: skip
    for timm_class, layer in layer_table().items():
        assert set(vars(layer)) <= allowed
        assert layer.__bases__ == (layers.Layer, timm_class)
        assert layer.__name__ == timm_class.__name__
        assert layer.__init__ is timm_class.__init__


def test_no_class_is_both_swapped_and_a_gap():
    assert not set(layer_table()) & set(gap_table())


def test_gaps_name_classes_that_exist():
    missing = [g.path for f in families() for g in f.gaps if g.resolve() is None]
    if timm.__version__ == "1.0.31":
        assert not missing
    assert len(missing) < 20


@pytest.mark.parametrize("family", families(), ids=lambda f: f.name)
def test_sample_is_a_model_of_its_family(family):
    if family.sample:
        assert ("", family.sample) in {("", n) for f, n in MODELS if f == family.name}


@pytest.fixture
def no_init(monkeypatch):
    """Weights on the meta device have no values to set."""
    for name in ("zeros_", "ones_", "constant_", "kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda t, *args, **kwargs: t)
    monkeypatch.setattr(weight_init, "_trunc_normal_", lambda t, *args, **kwargs: t)


@pytest.mark.parametrize("name", [name for _, name in MODELS])
def test_registered_model(no_init, name):
    model = timm.create_model(name, device="meta")
    keys = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    text = repr(model)
    report = swap(model)
    counts = report.counts
    assert counts["blocks"] > 0
    assert (counts["blocks_swapped"] == counts["blocks"]) == (name not in PARTLY)
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    whole = {e.path for e in report.swapped if not e.note}
    for path, module in model.named_modules():
        kind = layer_table().get(type(module))
        assert (
            kind is None
            or kind.by_shape
            or type(module) in refused(model, report)
            or any(path.startswith(f"{above}.") for above in whole)  # which computes what it would
        )
    restore(model)
    assert [type(m) for m in model.modules()] == classes


def refused(model, report):
    """Classes of modules that have a drop-in, but were built with an option that it lacks."""
    return {type(model.get_submodule(e.path)) for e in report.skipped}


def test_the_list_of_partly_swapped_models_is_current():
    assert {name for _, name in MODELS} >= PARTLY


def test_other_families_keep_their_blocks_and_outputs():
    torch.manual_seed(0)
    theirs = timm.create_model("cait_xxs24_224").eval()
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    assert report.counts["blocks_swapped"] == 0 < report.counts["blocks"]
    assert report.counts["swapped"] > 10
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
