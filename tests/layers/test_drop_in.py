"""What a swapped model keeps: weights, state_dict, repr, copies, training, tracing, compiling."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re

import pytest
import timm
import torch
from timm import layers as timm_layers
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import eva
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitfast.blocks.parts import drop_scale
from vitfast.ops import add_norm
from vitfast.plans import DropRate
from vitfast.swap import restore, swap

C, HEADS, N = 48, 3, 10
SMALL = dict(depth=2, embed_dim=C, num_heads=HEADS, img_size=32, num_classes=7)
MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(init_values=0.1, drop_path_rate=0.3)),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=28, init_values=0.1)),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "beit": ("beit_base_patch16_224", dict(init_values=0.1)),
    "relpos": ("vit_relpos_small_patch16_224", dict(rel_pos_type="bias")),
}


def pair_of(name: str, lively, **more):
    registered, options = MODELS[name]
    torch.manual_seed(0)
    theirs = lively(timm.create_model(registered, **(SMALL | options | more))).eval()
    ours = copy.deepcopy(theirs)
    swap(ours)
    size = theirs.patch_embed.img_size
    return theirs, ours, torch.randn(2, 3, *size)


@pytest.fixture(params=MODELS)
def pair(request, lively):
    return pair_of(request.param, lively)


def test_parameters_and_state_dict_are_the_same_objects(lively):
    for name in MODELS:
        model = pair_of(name, lively)[0]
        parameters = dict(model.named_parameters())
        modules = {n: id(m) for n, m in model.named_modules()}
        before = model.state_dict()
        swap(model)
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(before[k].data_ptr() == after[k].data_ptr() for k in before)
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert modules == {n: id(m) for n, m in model.named_modules()}


def test_classes_are_still_timms(pair):
    theirs, ours, _ = pair
    for a, b in zip(theirs.modules(), ours.modules(), strict=True):
        assert isinstance(b, type(a))


def test_repr_is_the_same(pair):
    theirs, ours, _ = pair
    assert repr(ours) == repr(theirs)


def test_state_dict_loads_both_ways(pair):
    theirs, ours, x = pair
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.9)
        ours(x)  # whatever is kept of the old weights must not outlive them
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


def test_deepcopy_and_pickle_stay_swapped(pair):
    _, ours, x = pair
    with torch.no_grad():
        expected = ours(x)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours)):
            assert [type(m) for m in copied.modules()] == [type(m) for m in ours.modules()]
            assert torch.equal(copied(x), expected)
            for p in copied.parameters():
                p.zero_()
            assert torch.equal(ours(x), expected)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_restore_is_bitwise_timm(pair):
    theirs, ours, x = pair
    restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours(x), theirs(x))


def changes():
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    def in_place(model):
        for p in model.parameters():
            p.mul_(0.5)

    def new_parameters(model):
        for m in model.modules():
            for n, p in m._parameters.items():
                if p is not None:
                    setattr(m, n, nn.Parameter(p * 0.5))

    return {
        "optimizer": step,
        "in_place": in_place,
        "data": lambda model: [p.data.mul_(0.5) for p in model.parameters()],
        "data_replaced": lambda model: [setattr(p, "data", p.data * 2) for p in model.parameters()],
        "new_parameters": new_parameters,
        "cast_and_back": lambda model: in_place(model.double()) or model.float(),
        "load": lambda model: model.load_state_dict(
            {k: v * 0.5 for k, v in model.state_dict().items()}
        ),
        "assign": lambda model: model.load_state_dict(
            {k: v * 0.5 for k, v in model.state_dict().items()}, assign=True
        ),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_no_weight_is_ever_stale(lively, change, autocast):
    for name in ("vit", "eva", "beit"):
        theirs, ours, x = pair_of(name, lively)
        # A region for each call: within one, autocast itself keeps the weights it has cast.
        region = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        with torch.no_grad():
            with region():
                before = ours(x)
            for model in (theirs, ours):
                changes()[change](model)
            with region():
                after = ours(x)
            with region():
                expected = theirs(x)
        assert (after - before).abs().max() > 1e-2
        tolerance = dict(rtol=5e-2, atol=5e-2) if autocast else {}
        torch.testing.assert_close(after, expected, **tolerance)


def test_moved_to_another_dtype(pair):
    theirs, ours, x = pair
    with torch.no_grad():
        ours(x)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            theirs.to(dtype), ours.to(dtype)
            y = ours(x.to(dtype))
            assert y.dtype == dtype
            tolerance = dict(rtol=0.1, atol=0.1) if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(y, theirs(x.to(dtype)), **tolerance)


def gradients(model: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    y = model(x) if call is None else call(x)
    y.square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing(pair, training):
    _, ours, x = pair
    plain = gradients(ours.train(training), x)
    ours.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(ours, x), plain)
    ours.set_grad_checkpointing(False)
    x.requires_grad_()
    again = gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=True))
    torch.testing.assert_close(again, plain)


def test_checkpoint_recomputes_bitwise(pair):
    _, ours, x = pair
    ours.train()
    plain = gradients(ours, x)
    again = gradients(ours, x, lambda x: checkpoint(ours, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Block, eva.EvaBlock])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_drop_path_draws_as_timm(make, gamma, dtype):
    """Same samples dropped, same generator state afterwards; rates may change between calls."""
    theirs = make(C, HEADS, drop_path=0.5, init_values=gamma).to(dtype)
    ours = copy.deepcopy(theirs)
    swap(ours)
    x = torch.randn(16, N, C, dtype=dtype)
    for rate in (0.5, 0.9, 1.0, 0.0):
        dropped, states = [], []
        for block in (theirs, ours):
            block.drop_path1.drop_prob = rate
            block.drop_path2.drop_prob = 1 - rate
            torch.manual_seed(11)
            y = block(x)
            dropped.append([torch.equal(a, b) for a, b in zip(x, y, strict=True)])
            states.append(torch.get_rng_state())
        assert dropped[0] == dropped[1]
        assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drop_factors_are_timms_to_the_bit(dtype):
    branch = torch.ones(64, N, C, dtype=dtype)
    for keep in (0.7, 0.1):
        torch.manual_seed(0)
        expected = timm_layers.drop_path(branch, 1 - keep, training=True)[:, 0, 0]
        torch.manual_seed(0)
        factors = drop_scale(branch, None, DropRate(1 - (1 - keep), True))
        assert torch.equal(factors, expected) and factors.dtype == dtype


def test_drop_path_without_scaling(parity, lively):
    block = lively(Block(C, HEADS, drop_path=0.5)).train()
    block.drop_path1.scale_by_keep = False
    parity(block, torch.randn(8, N, C))


def test_frozen_parts_get_no_gradient(pair):
    theirs, ours, x = pair
    for model in (theirs, ours):
        for n, p in model.named_parameters():
            p.requires_grad_("mlp" in n)
    a, b = gradients(theirs, x), gradients(ours, x)
    assert [g is None for g in a] == [g is None for g in b]
    for p, q in zip(a, b, strict=True):
        if p is not None:
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-4)


def test_frozen_model_records_nothing(pair):
    _, ours, x = pair
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    assert ours(x.requires_grad_()).requires_grad


def test_inference_mode(pair):
    theirs, ours, x = pair
    with torch.inference_mode():
        y = ours(x)
        assert y.is_inference()
        torch.testing.assert_close(y, theirs(x))
    ours(x).sum().backward()  # nothing of inference mode was kept


def test_input_is_not_written_to(lively):
    for make in (Block, eva.EvaBlock):
        block = lively(make(C, HEADS, init_values=0.1)).eval()
        swap(block)
        x = torch.randn(2, N, C)
        before, version = x.clone(), x._version
        with torch.no_grad():
            y = block(x)
        block(x)
        assert torch.equal(x, before) and x._version == version
        assert y.data_ptr() != x.data_ptr()


def names_of(model: nn.Module) -> list[str]:
    return get_graph_node_names(model)[1]


def test_fx_sees_timms_graph(pair):
    theirs, ours, x = pair
    names = names_of(theirs)
    assert names_of(ours) == names
    wanted = [n for n in names if re.fullmatch(r"blocks\.1\.(add_1|mlp\.fc1|norm1(\.layer.*)?)", n)]
    assert len(wanted) == 3
    a, b = (create_feature_extractor(m, wanted)(x) for m in (theirs, ours))
    torch.testing.assert_close(b, a)


def test_forward_intermediates_and_features(lively):
    theirs, ours, x = pair_of("vit", lively)
    torch.testing.assert_close(ours.forward_intermediates(x), theirs.forward_intermediates(x))
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=1, **SMALL)
    expected = model(x)
    assert swap(model).counts["blocks_swapped"] == 2
    torch.testing.assert_close(model(x), expected)


def test_jit_trace(pair):
    theirs, ours, x = pair
    with torch.no_grad():
        traced = torch.jit.trace(ours, x)
        torch.testing.assert_close(traced(x), theirs(x))
    assert "vitfast::" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_jit_script_restores_and_says_so(pair):
    theirs, ours, x = pair
    with pytest.warns(UserWarning, match=r"call vitfast.swap\(model\) again"):
        scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(x), theirs(x))
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert swap(ours).counts["blocks_swapped"] == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_torch_ops_only(pair, strict):
    theirs, ours, x = pair
    program = torch.export.export(ours, (x,), strict=strict)
    assert "vitfast." not in str(program.graph)
    torch.testing.assert_close(program.module()(x), theirs(x))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_as_one_graph(pair, training):
    theirs, ours, x = pair
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours.train(training), fullgraph=True, backend=backend)
    theirs.train(training)
    with torch.set_grad_enabled(training):
        for model in (theirs, compiled):
            torch.manual_seed(1)
            y = model(x)
            if model is theirs:
                expected = y
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert graphs[0].print_readable(print_output=False).count("vitfast.add_norm.default") == 2


def test_compiled_gradients(lively):
    theirs, ours, x = pair_of("vit", lively)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = gradients(theirs, x)
    torch.testing.assert_close(gradients(ours, x, compiled), expected, rtol=1e-3, atol=1e-3)


def test_compiled_for_any_batch_size(lively):
    _, ours, x = pair_of("vit", lively)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            y = x[:1].repeat(batch, 1, 1, 1)
            torch.testing.assert_close(compiled(y), ours(y))


def test_swap_after_compile_takes_effect(lively):
    theirs, _, x = pair_of("vit", lively)
    torch._dynamo.reset()
    compiled = torch.compile(theirs, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        assert swap(compiled).counts["blocks_swapped"] == 2
        torch.testing.assert_close(compiled(x), expected)
        restore(compiled)
        assert torch.equal(compiled(x), expected)


def test_ops_run_in_a_swapped_block(lively, monkeypatch):
    """The tests above compare numbers; this one holds that fused ops made them."""
    _, ours, x = pair_of("vit", lively)
    calls = []
    monkeypatch.setattr(
        "vitfast.ops.add_norm", lambda *a, **k: calls.append(1) or add_norm(*a, **k)
    )
    ours(x)
    assert len(calls) == 2
