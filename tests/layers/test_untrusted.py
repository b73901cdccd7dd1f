"""Where vitfast has no trusted kernels a swapped model is timm's: same bits, same work, no more."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import timm
import torch
from timm.layers import LayerScale
from timm.models.naflexvit import NaFlexVit
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.layers.conftest import CONTAINERS
from vitfast import ops, restore, swap
from vitfast.cli.main import main
from vitfast.layers import Layer
from vitfast.report import UNTRUSTED
from vitfast.runtime import native, trust

MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, init_values=0.1), 32),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=56, depths=(2, 2)), 56),
    "swin_v2": ("swinv2_tiny_window8_256", dict(img_size=64, depths=(2, 2)), 64),
    "convnext": ("convnext_atto", dict(depths=(2, 1, 1, 1)), 32),
    "convnext_v2": ("convnextv2_atto", dict(depths=(1, 1, 1, 1)), 32),
    "hybrid": ("vit_small_r26_s32_224", dict(img_size=64, depth=2), 64),
    "maxvit": ("maxvit_rmlp_pico_rw_256", dict(img_size=64, depths=(1, 1, 1, 1)), 64),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=28, depth=2), 28),
    "metaformer": ("caformer_s18", {}, 32),
}


@pytest.fixture(params=MODELS)
def pair(request, lively) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """timm's model, a swapped copy, and images."""
    name, options, size = MODELS[request.param]
    model = lively(timm.create_model(name, num_classes=10, **options)).eval()
    if request.param == "metaformer":  # which takes no depths
        for stage in model.stages:
            stage.blocks = stage.blocks[:1]
    ours = copy.deepcopy(model)
    swap(ours)
    return model, ours, torch.randn(2, 3, size, size)


def work(model: nn.Module, x: torch.Tensor, train: bool) -> Counter:
    """How often each op of torch's or ours runs, with the shapes of its inputs."""
    for p in model.parameters():
        p.grad = None
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        with torch.set_grad_enabled(train):
            out = model(x)
        if train:
            out.sum().backward()
    return Counter((e.name, str(e.input_shapes)) for e in seen.events() if "::" in e.name)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("why", ["no extension", "float64"])
def test_without_kernels_the_work_is_timms(pair, monkeypatch, why, train):
    model, ours, x = pair
    if why == "float64":
        model, ours, x = model.double(), ours.double(), x.double()
    else:
        monkeypatch.setattr(native, "reasons", lambda: ["native extension not built"])
    for _ in range(2):  # what a first call keeps may change the next
        expected, found = work(model, x, train), work(ours, x, train)
    assert not found - expected
    assert not expected - found
    assert any("mm" in name for name, _ in found)
    assert not any(name.startswith("vitfast::") for name, _ in found)
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0)


def test_with_kernels_it_is_not(pair, needs_native):
    """The comparison above would see an op of ours."""
    model, ours, x = pair
    assert any(name.startswith("vitfast::") for name, _ in work(ours, x, True))


def test_trust_is_a_matter_of_each_layer(pair, monkeypatch, needs_native):
    """A block with an op that is not trusted runs timm's forward, on layers whose ops all are."""
    _, ours, x = pair
    monkeypatch.setattr(
        trust, "_reason", lambda ops, *_: "" if set(ops) <= {"layer_norm", "linear_act"} else "no"
    )
    called = {name for name, _ in work(ours, x, True) if name.startswith("vitfast::")}
    assert called <= {
        "vitfast::layer_norm", "vitfast::layer_norm_backward",
        "vitfast::linear_act", "vitfast::linear_act_backward",
    }  # fmt: skip


def test_trust_is_asked_for_at_every_call(lively, monkeypatch, needs_native):
    """What a memo keeps does not outlive the trust in its ops."""
    model = lively(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)).eval()
    ours = copy.deepcopy(model)
    swap(ours)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(4):
            fused = ours(x)
        with monkeypatch.context() as patch:
            patch.setattr(trust, "_reason", lambda *_: "no")
            torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(ours(x), fused, rtol=0, atol=0)


def test_the_compiled_graph_is_timms(lively):
    """torch.compile sees what timm would have it see, in one graph."""
    model = lively(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)).eval().half()
    ours = copy.deepcopy(model)
    swap(ours)
    x = torch.randn(1, 3, 32, 32).half()
    codes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        codes.append(Counter((n.op, str(n.target)) for n in graph.graph.nodes))
        return graph

    for module in (model, ours):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(module, fullgraph=True, backend=backend)(x)
    functions = [{k: v for k, v in code.items() if k[0] == "call_function"} for code in codes]
    assert len(codes) == 2 and functions[0] == functions[1]


def test_the_report_says_why(lively, needs_native):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).half()
    report = swap(model)
    note = f"{UNTRUSTED}there are no kernels for torch.float16 on the CPU"
    assert {entry.note for entry in report.swapped} == {note}
    count = len(report.swapped)
    line = f"{count} modules in all; {count} of them run timm's forward now"
    assert str(report).splitlines()[0].endswith(line)
    restore(model)
    assert swap(model).gains_nothing == note
    report = swap(model.float())
    assert {entry.note for entry in report.swapped} == {""} and report.gains_nothing == ""


def test_the_report_says_so_of_called_children_too(lively, needs_native):
    """What a block would call instead of reading does not matter where all of it is timm's."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).half()
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    assert all(entry.note.startswith(UNTRUSTED) for entry in swap(model).swapped)


def test_the_command_judges_the_device_it_is_asked_for(monkeypatch, capsys):
    """Its model lies on none."""
    asked = []
    monkeypatch.setattr(trust, "_reason", lambda ops, device, *_: asked.append(device) or "no file")
    assert main(["swap", "beit_base_patch16_224", "--device", "cpu"]) == 0
    assert set(asked) == {torch.device("cpu")}
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("62 modules in all; 62 of them run timm's forward now")
    assert out.count(f"{UNTRUSTED}no file") == 7


PICKED = MODELS | {
    "hiera": ("hiera_tiny_224", dict(img_size=64), 64),
    "davit": ("davit_tiny", dict(depths=(1, 1, 1, 1)), 64),
    "rdnet": ("rdnet_tiny", {}, 64),
    "beit": ("beit_base_patch16_224", dict(img_size=32, depth=1), 32),
    "swin_v2_cr": ("swinv2_cr_tiny_ns_224", dict(img_size=64, depths=(1, 1, 1, 1)), 64),
}


@pytest.mark.parametrize("name", PICKED)
def test_a_layer_names_all_its_ops(lively, monkeypatch, ops_picked, name):
    """An op that nobody trusts is not called, for every layer that might is left to timm."""
    architecture, options, size = PICKED[name]
    model = lively(timm.create_model(architecture, num_classes=10, **options)).eval()
    swap(model)
    x = torch.randn(1, 3, size, size)
    with ops_picked() as picked:
        model(x)
    assert picked
    for op in sorted(picked):
        with monkeypatch.context() as patch, ops_picked() as found:
            patch.setattr(trust, "_reason", lambda names, *_, op=op: "no" if op in names else "")
            model(x)
        assert op not in found


def test_every_layer_names_ops_that_exist():
    """A layer of which nothing is known could not be left to timm."""
    kinds = [k for k in vars(__import__("vitfast").layers).values() if isinstance(k, type)]
    layers = [k for k in kinds if issubclass(k, Layer) and k is not Layer]
    assert layers
    assert {op for k in layers for op in k.ops} <= set(ops.NAMES)
    without = {k.timm_class for k in layers if not k.ops}
    assert without == {LayerScale, *CONTAINERS} - {NaFlexVit}  # whose forward may be timm's


def test_ops_without_kernels_of_ours_are_those_without_triton():
    without = {s.name for s in ops.specs() if "triton" not in s.dispatcher.backends}
    assert without == trust.WITHOUT_OURS
