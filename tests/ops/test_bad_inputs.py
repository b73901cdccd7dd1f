"""Arguments that no backend could accept raise before anything runs, and say what is wrong.

Every message names the op, the argument, what came and what was wanted.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

import vitfast.ops as ops
from tests.ops.good_arguments import OPS, TENSORS, good
from vitfast.errors import VitfastError
from vitfast.ops.varlen_attention.spec import cumulative

Z = torch.zeros


@pytest.mark.parametrize("op", OPS)
def test_the_good_arguments_are_good(op):
    result = getattr(ops, op)(**good(op))
    assert all(t.isfinite().all() for t in ([result] if torch.is_tensor(result) else result))


def refuse(monkeypatch, op, arguments, error, *fragments):
    """The call raises this built-in error, as one of vitfast's, before a backend is picked."""
    function, dispatcher = getattr(ops, op), ops.spec_of(op).dispatcher

    def pick(*args, **kwargs):
        raise AssertionError("a backend was picked for bad arguments")

    monkeypatch.setattr(dispatcher, "pick", pick)
    with pytest.raises(error) as caught:
        function(**arguments)
    assert isinstance(caught.value, VitfastError), repr(caught.value)
    for fragment in (op, *fragments):
        assert re.search(fragment, str(caught.value)), (fragment, str(caught.value))


# ---- every tensor argument of every op -----------------------------------------------------------

WRONG_TENSORS = {
    "not_a_tensor": (lambda t: [1.0, 2.0], TypeError, "torch.Tensor.*list"),
    "int64": (lambda t: t.long(), TypeError, "torch.int64.*float32"),
    "bool": (lambda t: t > 0, TypeError, "torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), TypeError, "torch.complex64"),
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), NotImplementedError, "float8_e4m3fn"),
    "sparse": (lambda t: t.to_sparse(), NotImplementedError, "sparse"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        NotImplementedError,
        "dense.*quantised",
    ),
    "onednn": (lambda t: t.flatten().to_mkldnn(), NotImplementedError, "dense.*_mkldnn"),
    "lazy_conjugate": (lambda t: torch.complex(t, t).conj(), TypeError, "torch.complex64"),
    "nested": (
        lambda t: torch.nested.nested_tensor([Z(2), Z(3)], layout=torch.jagged),
        NotImplementedError,
        "dense",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_kinds_of_tensors(monkeypatch, op, name, wrong):
    change, error, fragment = WRONG_TENSORS[wrong]
    arguments = good(op)
    arguments[name] = change(arguments[name])
    refuse(monkeypatch, op, arguments, error, rf"\b{name}\b", fragment)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_devices(monkeypatch, op, name):
    arguments = good(op)
    arguments[name] = arguments[name].to("meta")
    refuse(monkeypatch, op, arguments, RuntimeError, rf"\b{name}\b", "cpu", "meta")


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in TENSORS if n not in ("x", "image")])
def test_one_dimension_too_many(monkeypatch, op, name):
    arguments = good(op)
    arguments[name] = arguments[name][None]
    refuse(monkeypatch, op, arguments, ValueError, rf"\b{name}\b")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_one_element_too_many(monkeypatch, op, name):
    arguments = good(op)
    t = arguments[name]
    arguments[name] = torch.cat((t, t[..., :1]), -1)
    refuse(monkeypatch, op, arguments, ValueError, r"\d")


@pytest.mark.parametrize("op", OPS)
def test_scalars(monkeypatch, op):
    arguments = good(op)
    name = next(iter(arguments))
    arguments[name] = torch.tensor(1.0)
    refuse(monkeypatch, op, arguments, ValueError, rf"\b{name}\b|branch")


# ---- particular arguments ------------------------------------------------------------------------

PARTICULAR = [
    # (op, changed arguments, error, fragments of the message)
    ("attention", {"q": Z(2, 5, 3, 8).half(), "k": Z(2, 5, 3, 8).bfloat16()}, TypeError,
     ["float16", "k", "bfloat16"]),
    ("attention", {"bias": Z(3, 5, 5).double()}, TypeError, ["bias", "float64"]),
    ("attention", {"mask": Z(5, 5).double()}, TypeError, ["mask", "float64"]),
    ("attention", {"q": Z(5, 8)}, ValueError, ["q", r"\(5, 8\)", "B, N"]),
    ("attention", {"q": Z(2, 5, 3, 3, 8)}, ValueError, ["q", r"\(2, 5, 3, 3, 8\)"]),
    ("attention", {"k": None, "v": None}, ValueError, ["q", "packed", r"\[B, N, 3, H, D\]"]),
    ("attention", {"v": None}, ValueError, ["k and v"]),
    ("attention", {"k": None}, ValueError, ["k and v"]),
    ("attention", {"q": Z(2, 5, 2, 3, 8), "k": None, "v": None}, ValueError, ["q", "3"]),
    ("attention", {"k": Z(2, 5, 3, 4)}, ValueError, ["k", r"\(2, 5, 3, 4\)", r"\(2, 5, 3, 8\)"]),
    ("attention", {"v": Z(2, 6, 3, 8)}, ValueError, ["v", r"\(2, 6, 3, 8\)", r"\(2, 5, 3, 8\)"]),
    ("attention", {"k": Z(3, 5, 3, 8), "v": Z(3, 5, 3, 8)}, ValueError, ["k", "3, 5"]),
    ("attention", {"k": Z(2, 5, 1, 8), "v": Z(2, 5, 1, 8)}, ValueError, ["k", "1, 8"]),
    ("attention", {n: Z(2, 5, 3, 0) for n in "qkv"}, ValueError, ["head dim"]),
    ("attention", {"mask": Z(5, 4)}, ValueError, ["mask", r"\(5, 4\)", r"\(2, 3, 5, 5\)"]),
    ("attention", {"mask": Z(1, 2, 3, 5, 5)}, ValueError, ["mask", r"\(2, 3, 5, 5\)"]),
    ("attention", {"mask": Z(5, 5, dtype=torch.int32)}, TypeError, ["mask", "int32", "bool"]),
    ("attention", {"bias": Z(5, 5)}, ValueError, ["bias", r"\(5, 5\)", r"\(3, 5, 5\)"]),
    ("attention", {"bias": Z(2, 3, 5, 5)}, ValueError, ["bias", r"\(2, 3, 5, 5\)"]),
    ("attention", {"bias": Z(3, 5, 49)}, ValueError, ["bias", "49"]),
    ("attention", {"bias": Z(3, 5, 5, dtype=torch.int64)}, TypeError, ["bias", "int64"]),
    ("attention", {"scale": math.nan}, ValueError, ["scale", "nan"]),
    ("attention", {"scale": -math.inf}, ValueError, ["scale", "inf"]),
    ("attention", {"qk_norm": "group"}, ValueError, ["qk_norm", "group", "layer"]),
    ("attention", {"q_norm_weight": Z(8)}, ValueError, ["q_norm_weight", "qk_norm"]),
    ("attention", {"qk_norm": "rms", "k_norm_bias": Z(8)}, ValueError, ["k_norm_bias"]),
    ("attention", {"qk_norm": "rms", "q_norm_weight": Z(24)}, ValueError,
     ["q_norm_weight", r"\(24,\)", r"\(8,\)"]),
    ("attention", {"qk_norm": "rms", "qk_norm_eps": 0.0}, ValueError, ["eps", "0.0"]),
    ("attention", {"rope": Z(5, 8)}, ValueError, ["rope", r"\(5, 8\)", r"\[5, 16\]"]),
    ("attention", {"rope": Z(5, 16), "rope_prefix": 1}, ValueError, ["rope", r"\[4, 16\]"]),
    ("attention", {"rope": Z(2, 5, 16)}, ValueError, ["rope", r"\(2, 5, 16\)"]),
    ("attention", {"rope": Z(5, 16), "rope_prefix": 6}, ValueError, ["rope_prefix", "6"]),
    ("attention", {"rope": Z(5, 16), "rope_prefix": -1}, ValueError, ["rope_prefix", "-1"]),
    ("attention", {n: Z(2, 5, 3, 7) for n in "qkv"} | {"rope": Z(5, 14)}, ValueError,
     ["rope", "even", "7"]),
    ("attention", {"q": Z(2, 4, 3, 8), "rope": Z(4, 16)}, ValueError, ["rope", "4", "5"]),
    ("layer_norm", {"weight": Z(5)}, ValueError, ["weight", r"\(5,\)", r"\(8,\)"]),
    ("layer_norm", {"eps": 0.0}, ValueError, ["eps", "0.0", "positive"]),
    ("layer_norm", {"eps": -1e-6}, ValueError, ["eps", "-1e-06"]),
    ("layer_norm", {"eps": math.nan}, ValueError, ["eps", "nan"]),
    ("layer_norm", {"out_dtype": torch.int32}, TypeError, ["out_dtype", "int32"]),
    ("rms_norm", {"eps": -1.0}, ValueError, ["eps", "-1.0"]),
    ("rms_norm", {"weight": Z(2, 5, 8)}, ValueError, ["weight", r"\(8,\)"]),
    ("add_norm", {"eps": 0.0}, ValueError, ["eps"]),
    ("add_norm", {"norm": "group"}, ValueError, ["norm", "group", "rms"]),
    ("add_norm", {"norm": "rms"}, ValueError, ["bias", "rms"]),
    ("add_norm", {"branch": Z(2, 4, 8)}, ValueError, ["branch", r"\(2, 4, 8\)", r"\(2, 5, 8\)"]),
    ("add_norm", {"branch": Z(5, 8)}, ValueError, ["branch", r"\(5, 8\)"]),
    ("add_norm", {"drop_scale": Z(5)}, ValueError, ["drop_scale", r"\(5,\)", r"\(2,\)"]),
    ("norm_add", {"eps": 0.0}, ValueError, ["eps"]),
    ("norm_add", {"norm": "group"}, ValueError, ["norm", "group", "rms"]),
    ("norm_add", {"norm": None}, ValueError, ["norm", "None", "rms"]),
    ("norm_add", {"norm": "rms"}, ValueError, ["bias", "rms"]),
    ("norm_add", {"branch": Z(2, 4, 8)}, ValueError, ["branch", r"\(2, 4, 8\)", r"\(2, 5, 8\)"]),
    ("norm_add", {"weight": Z(5)}, ValueError, ["weight", r"\(5,\)", r"\(8,\)"]),
    ("norm_add", {"drop_scale": Z(5)}, ValueError, ["drop_scale", r"\(5,\)", r"\(2,\)"]),
    ("patch_merge", {"x": Z(2, 30, 8)}, ValueError, ["x", "B, H, W, C", r"\(2, 30, 8\)"]),
    ("patch_merge", {"weight": Z(8)}, ValueError, ["weight", r"\(8,\)", r"\(32,\)"]),
    ("patch_merge", {"bias": Z(2, 32)}, ValueError, ["bias", r"\(2, 32\)", r"\(32,\)"]),
    ("patch_merge", {"eps": 0.0}, ValueError, ["eps"]),
    ("patch_merge", {"norm": "none"}, ValueError, ["norm", "none", "rms", "None"]),
    ("patch_merge", {"norm": "rms"}, ValueError, ["bias", "rms"]),
    ("patch_merge", {"norm": None}, ValueError, ["None", "weight", "bias"]),
    ("patch_merge", {"out_dtype": torch.int8}, TypeError, ["out_dtype", "int8"]),
    ("dwconv_norm", {"x": Z(2, 30, 8)}, ValueError, ["x", "B, H, W, C", r"\(2, 30, 8\)"]),
    ("dwconv_norm", {"weight": Z(8, 1, 4, 4)}, ValueError, ["weight", "odd", r"\(8, 1, 4, 4\)"]),
    ("dwconv_norm", {"weight": Z(8, 1, 0, 3)}, ValueError, ["weight", "odd"]),
    ("dwconv_norm", {"weight": Z(8, 8, 3, 3)}, ValueError, ["weight", r"\[8, 1, k, k'\]"]),
    ("dwconv_norm", {"weight": Z(5, 1, 3, 3)}, ValueError, ["weight", r"\[8, 1, k, k'\]"]),
    ("dwconv_norm", {"weight": None}, TypeError, ["weight", "NoneType"]),
    ("dwconv_norm", {"weight": Z(8, 1, 3, 3).half()}, TypeError, ["weight", "float16", "float32"]),
    ("dwconv_norm", {"bias": Z(8).bfloat16()}, TypeError, ["bias", "bfloat16", "float32"]),
    ("dwconv_norm", {"bias": Z(5)}, ValueError, ["bias", r"\(5,\)", r"\(8,\)"]),
    ("dwconv_norm", {"norm_weight": Z(2, 8)}, ValueError, ["norm_weight", r"\(2, 8\)"]),
    ("dwconv_norm", {"eps": 0.0}, ValueError, ["eps"]),
    ("dwconv_norm", {"norm": "batch"}, ValueError, ["norm", "batch", "rms", "None"]),
    ("dwconv_norm", {"norm": "rms"}, ValueError, ["norm_bias", "rms"]),
    ("dwconv_norm", {"norm": None}, ValueError, ["None", "norm_weight", "norm_bias"]),
    ("dwconv_norm", {"out_dtype": torch.int8}, TypeError, ["out_dtype", "int8"]),
    ("group_norm_act", {"x": Z(2, 8, 30)}, ValueError, ["x", "B, C, H, W", r"\(2, 8, 30\)"]),
    ("group_norm_act", {"groups": 3}, ValueError, ["groups", "3", "8 channels"]),
    ("group_norm_act", {"groups": 0}, ValueError, ["groups", "0"]),
    ("group_norm_act", {"groups": 2.0}, ValueError, ["groups", r"2\.0"]),
    ("group_norm_act", {"weight": Z(4)}, ValueError, ["weight", r"\(4,\)", r"\(8,\)"]),
    ("group_norm_act", {"bias": Z(2, 8)}, ValueError, ["bias", r"\(2, 8\)", r"\(8,\)"]),
    ("group_norm_act", {"residual": Z(2, 8, 6, 5)}, ValueError, ["residual", "6, 5", "5, 6"]),
    ("group_norm_act", {"eps": 0.0}, ValueError, ["eps"]),
    ("group_norm_act", {"act": "gelu"}, ValueError, ["act", "gelu", "relu"]),
    ("group_norm_act", {"out_dtype": torch.int8}, TypeError, ["out_dtype", "int8"]),
    ("residual_add", {"gamma": Z(1)}, ValueError, ["gamma", r"\(1,\)", r"\(8,\)"]),
    ("residual_add", {"drop_scale": Z(2, 1, 1)}, ValueError, ["drop_scale", r"\(2,\)"]),
    ("varlen_attention", {"q": Z(7, 3, 8).half()}, TypeError, ["q", "float16", "float32"]),
    ("varlen_attention", {"q": Z(1, 7, 3, 8)}, ValueError, ["q", r"\(1, 7, 3, 8\)", "total, H, D"]),
    ("varlen_attention", {"k": None, "v": None}, ValueError, ["q", r"\[total, 3, H, D\]"]),
    ("varlen_attention", {"v": None}, ValueError, ["k and v"]),
    ("varlen_attention", {"k": Z(6, 3, 8)}, ValueError, ["k", r"\(6, 3, 8\)", r"\(7, 3, 8\)"]),
    ("varlen_attention", {"v": Z(7, 1, 8)}, ValueError, ["v", r"\(7, 1, 8\)", r"\(7, 3, 8\)"]),
    ("varlen_attention", {n: Z(7, 3, 0) for n in "qkv"}, ValueError, ["head dim"]),
    ("varlen_attention", {"cu_seqlens": [0, 2, 7]}, TypeError, ["cu_seqlens", "list"]),
    ("varlen_attention", {"cu_seqlens": torch.tensor([0, 2, 7])}, TypeError,
     ["cu_seqlens", "int64", "int32"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 5]).to("meta")}, RuntimeError,
     ["cu_seqlens", "cpu", "meta"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 5])[None]}, ValueError,
     ["cu_seqlens", r"\(1, 3\)", r"\[B \+ 1\]"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 5])[:0]}, ValueError,
     ["cu_seqlens", r"\(0,\)", r"\[B \+ 1\]"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 5])[1:]}, ValueError,
     ["cu_seqlens", "begins with 2", "0"]),
    ("varlen_attention", {"cu_seqlens": cumulative([5, -3, 5])}, ValueError,
     ["cu_seqlens", "decreases from 5 to 2"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 4])}, ValueError,
     ["cu_seqlens", "ends with 6", "7 tokens"]),
    ("varlen_attention", {"cu_seqlens": cumulative([2, 6])}, ValueError,
     ["cu_seqlens", "ends with 8", "7 tokens"]),
    ("varlen_attention", {"max_seqlen": 4}, ValueError, ["max_seqlen is 4", "5 tokens"]),
    ("varlen_attention", {"max_seqlen": -1}, ValueError, ["max_seqlen", "-1"]),
    ("varlen_attention", {"max_seqlen": 5.0}, TypeError, ["max_seqlen", "float"]),
    ("varlen_attention", {"scale": math.inf}, ValueError, ["scale", "inf"]),
    ("varlen_attention", {"qk_norm": "group"}, ValueError, ["qk_norm", "group", "layer"]),
    ("varlen_attention", {"k_norm_weight": Z(8)}, ValueError, ["k_norm_weight", "qk_norm"]),
    ("varlen_attention", {"qk_norm": "rms", "k_norm_bias": Z(8)}, ValueError, ["k_norm_bias"]),
    ("varlen_attention", {"qk_norm": "rms", "q_norm_weight": Z(24)}, ValueError,
     ["q_norm_weight", r"\(24,\)", r"\(8,\)"]),
    ("varlen_attention", {"rope": Z(5, 16)}, ValueError, ["rope", r"\(5, 16\)", r"\[7, 16\]"]),
    ("varlen_attention", {"rope": Z(2, 7, 16)}, ValueError, ["rope", r"\[3, 7, 16\]"]),
    ("varlen_attention", {"rope": Z(7, 14), **{n: Z(7, 3, 7) for n in "qkv"}}, ValueError,
     ["rope", "even", "7"]),
    ("mlp", {"act": "gelo"}, ValueError, ["act", "gelo", "gelu"]),
    ("mlp", {"weight1": Z(6, 7)}, ValueError, ["x", "8", "7"]),
    ("mlp", {"weight2": Z(4, 5)}, ValueError, ["weight2", "4, 5", "6"]),
    ("mlp", {"weight2": Z(4, 6, 3, 3)}, ValueError, ["weight2", "3, 3"]),
    ("mlp", {"bias1": Z(8)}, ValueError, ["bias1", r"\(8,\)", r"\(6,\)"]),
    ("mlp", {"bias2": Z(8)}, ValueError, ["bias2", r"\(8,\)", r"\(4,\)"]),
    ("mlp", {"weight1": Z(6, 8).half()}, TypeError, ["weight1", "float16", "float32"]),
    ("mlp", {"gate": "middle"}, ValueError, ["gate", "middle"]),
    ("linear_act", {"act": "gelo"}, ValueError, ["act", "gelo", "gelu"]),
    ("linear_act", {"weight": Z(6, 7)}, ValueError, ["x", "8", "7"]),
    ("linear_act", {"weight": Z(6, 8, 3, 3)}, ValueError, ["weight", "3, 3"]),
    ("linear_act", {"bias": Z(8)}, ValueError, ["bias", r"\(8,\)", r"\(6,\)"]),
    ("linear_act", {"weight": Z(6, 8).half()}, TypeError, ["weight", "float16", "float32"]),
    ("linear_act", {"gate": "middle"}, ValueError, ["gate", "middle"]),
    ("linear_act", {"weight": Z(5, 8), "bias": None, "gate": "last"}, ValueError, ["even", "5"]),
    ("linear_act", {"gate_bias": Z(6)}, ValueError, ["gate_bias", "gate_weight"]),
    ("linear_act", {"gate": "first", "gate_weight": Z(6, 8)}, ValueError, ["gate_weight"]),
    ("linear_act", {"gate_weight": Z(5, 8)}, ValueError, ["gate_weight", r"\(5, 8\)"]),
    ("patch_embed", {"image": Z(2, 4, 8, 12)}, ValueError, ["4", "3"]),
    ("patch_embed", {"image": Z(2, 3, 9, 12)}, ValueError, ["9 x 12", "4 x 4"]),
    ("patch_embed", {"image": Z(3, 8, 12)}, ValueError, ["image", r"\(3, 8, 12\)", "B, Cin"]),
    ("patch_embed", {"image": Z(2, 3, 8, 12).half()}, TypeError, ["image", "float16"]),
    ("patch_embed", {"weight": Z(6, 3, 0, 4)}, ValueError, ["0 x 4"]),
    ("patch_embed", {"mean": [0.5, 0.5]}, ValueError, ["mean", r"\(2,\)", r"\(3,\)"]),
    ("patch_embed", {"std": Z(3, 1, 1)}, ValueError, ["std", r"\(3,\)"]),
    ("patch_embed", {"pos_embed": Z(1, 5, 6)}, ValueError, ["pos_embed", "5", "6 or 7"]),
    ("patch_embed", {"prefix": Z(3, 1, 6)}, ValueError, ["prefix", r"\(3, 1, 6\)"]),
    ("patch_embed", {"prefix": Z(1, 6)}, ValueError, ["prefix", r"\(1, 6\)"]),
    ("window_attention", {"qkv": Z(2, 9, 6, 2, 2, 8)}, ValueError, ["qkv", "3, heads, D"]),
    ("window_attention", {"qkv": Z(2, 9, 6, 48)}, ValueError, ["qkv", "3, heads, D"]),
    ("window_attention", {"window": 4}, TypeError, ["window", "4"]),
    ("window_attention", {"window": (4.0, 4)}, TypeError, ["window", "4.0"]),
    ("window_attention", {"window": (0, 4)}, ValueError, ["window", "0"]),
    ("window_attention", {"window": (700, 700), "table": None}, ValueError,
     ["window", r"\(700, 700\)", "490000", r"\[9, 6\]", "65536"]),
    ("window_attention", {"window": (1, 70_000), "shift": (0, 0), "table": None}, ValueError,
     ["window", r"\(1, 70000\)", r"\[9, 6\]", "65536"]),
    ("window_attention", {"window": (4, 5)}, ValueError, ["table", r"\(49, 2\)", r"\(63, 2\)"]),
    ("window_attention", {"shift": (4, 0)}, ValueError, ["shift", r"\(4, 4\)", r"\(4, 0\)"]),
    ("window_attention", {"shift": (-1, 0)}, ValueError, ["shift", "-1"]),
    ("window_attention", {"grid": True}, ValueError, ["grid", "shift", r"\(2, 2\)"]),
    ("window_attention", {"grid": True, "shift": (0, 0)}, ValueError,
     ["grid", r"\(4, 4\)", r"\[9, 6\]"]),
    ("window_attention", {"scale": 0.5}, ValueError, ["scale", "logit_scale"]),
    ("window_attention", {"logit_scale": None, "scale": float("nan")}, ValueError, ["scale"]),
    ("window_attention", {"logit_scale": Z(2, 1, 1)}, ValueError, ["logit_scale", r"\(2,\)"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "changes", "error", "fragments"),
    PARTICULAR,
    ids=[f"{i}-{c[0]}-{'-'.join(c[1])}" for i, c in enumerate(PARTICULAR)],
)
def test_particular_arguments(monkeypatch, op, changes, error, fragments):
    refuse(monkeypatch, op, good(op) | changes, error, *fragments)


def test_a_compiled_call_raises_the_same(monkeypatch):
    """Checks do not vanish under torch.compile."""
    torch._dynamo.reset()
    function = torch.compile(ops.layer_norm, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"layer_norm: weight has shape \(5,\), expected \(8,\)"):
        function(torch.randn(2, 8), torch.randn(5))
