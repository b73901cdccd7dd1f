"""Under autocast every op gives the dtype that timm's own composition of torch ops would give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vitfast.ops as ops

LOW = torch.bfloat16


def _t(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def _add_norm(x, branch, weight, bias, gamma):
    x = x + branch * gamma
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def _patch_embed(image, weight, bias, pos_embed, prefix):
    x = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return x if prefix is None else torch.cat((prefix.expand(x.shape[0], -1, -1), x + pos_embed), 1)


def _grn(x, weight, bias):
    g = x.norm(p=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(-1, keepdim=True) + 1e-6)
    return x + torch.addcmul(bias, weight, x * n)


def _merge(x):
    x = F.pad(x, (0, 0, 0, 0, 0, 1))
    return x.unfold(1, 2, 2).unfold(2, 2, 2).permute(0, 1, 2, 5, 4, 3).flatten(3)


def _dwconv(x, weight, bias):
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3])
    return x.permute(0, 2, 3, 1)


# name -> (arguments, the op on them, torch's own composition on them)
COMPOSITIONS = {
    "layer_norm": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(8), _t(8)),
        ops.layer_norm,
        lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-6),
    ),
    "rms_norm": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(8, dtype=d)),
        ops.rms_norm,
        lambda x, w: F.rms_norm(x, (8,), w, 1e-6),
    ),
    "add_norm_of_a_lowered_branch": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(2, 5, 8, dtype=LOW), _t(8), _t(8), _t(8)),
        lambda x, branch, w, b, gamma: ops.add_norm(x, branch, w, b, gamma=gamma),
        _add_norm,
    ),
    "norm_add_of_a_lowered_branch": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(2, 5, 8, dtype=LOW), _t(8), _t(8)),
        ops.norm_add,
        lambda x, branch, w, b: x + F.layer_norm(branch, (8,), w, b, 1e-6),
    ),
    "residual_add": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(2, 5, 8, dtype=LOW)),
        ops.residual_add,
        lambda x, branch: x + branch,
    ),
    "residual_add_of_layer_scale": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(2, 5, 8, dtype=LOW), _t(8)),
        lambda x, branch, gamma: ops.residual_add(x, branch, gamma=gamma),
        lambda x, branch, gamma: x + branch * gamma,
    ),
    "attention": (
        lambda d: tuple(_t(2, 5, 3, 8, dtype=d) for _ in range(3)),
        ops.attention,
        lambda *qkv: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).mT,
    ),
    "attention_with_bias": (
        lambda d: (*(_t(2, 5, 3, 8, dtype=d) for _ in range(3)), _t(1, 3, 5, 5)),
        lambda q, k, v, bias: ops.attention(q, k, v, bias=bias),
        lambda q, k, v, bias: F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias.to(LOW)
        ),
    ),
    "varlen_attention": (
        lambda d: (
            *(_t(5, 3, 8, dtype=d) for _ in range(3)),
            torch.tensor([0, 5], dtype=torch.int32),
        ),
        ops.varlen_attention,
        lambda q, k, v, _: F.scaled_dot_product_attention(*(t.mT for t in (q, k, v))).mT,
    ),
    "linear_act": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(6, 8), _t(6)),
        lambda x, w, b: ops.linear_act(x, w, b, "gelu"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
    ),
    "mlp": (
        lambda d: (_t(2, 5, 8, dtype=d), _t(6, 8), _t(6), _t(8, 6), _t(8)),
        ops.mlp,
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    ),
    "window_attention": (
        lambda d: (_t(2, 4, 4, 3, 2, 8, dtype=d), _t(49, 2)),
        lambda qkv, table: ops.window_attention(qkv, (4, 4), table=table),
        lambda qkv, table: F.scaled_dot_product_attention(
            *qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        ),
    ),
    "patch_merge": (
        lambda d: (_t(2, 3, 6, 8, dtype=d), _t(32), _t(32)),
        ops.patch_merge,
        lambda x, w, b: F.layer_norm(_merge(x), (32,), w, b, 1e-5),
    ),
    "patch_merge_without_a_norm": (
        lambda d: (_t(2, 3, 6, 8, dtype=d),),
        lambda x: ops.patch_merge(x, norm=None),
        lambda x: _merge(x),
    ),
    "dwconv_norm": (
        lambda d: (_t(2, 5, 6, 8, dtype=d), _t(8, 1, 3, 3), _t(8), _t(8), _t(8)),
        ops.dwconv_norm,
        lambda x, w, b, *affine: F.layer_norm(_dwconv(x, w, b), (8,), *affine, 1e-6),
    ),
    "dwconv_norm_without_a_norm": (
        lambda d: (_t(2, 5, 6, 8, dtype=d), _t(8, 1, 3, 3), _t(8)),
        lambda x, w, b: ops.dwconv_norm(x, w, b, norm=None),
        _dwconv,
    ),
    "grn": (lambda d: (_t(2, 5, 6, 8, dtype=d), _t(8), _t(8)), ops.grn, _grn),
    "grn_of_weights_of_its_dtype": (
        lambda d: (_t(2, 5, 6, 8, dtype=d), _t(8, dtype=d), _t(8, dtype=d)),
        ops.grn,
        _grn,
    ),
    "group_norm_act": (
        lambda d: (_t(2, 8, 3, 5, dtype=d), _t(8), _t(8)),
        lambda x, w, b: ops.group_norm_act(x, 4, w, b, act="relu"),
        lambda x, w, b: F.relu(F.group_norm(x, 4, w, b)),
    ),
    "group_norm_act_of_a_lowered_map": (
        lambda d: (_t(2, 8, 3, 5, dtype=LOW), _t(8), _t(8), _t(2, 8, 3, 5, dtype=d)),
        lambda x, w, b, r: ops.group_norm_act(x, 4, w, b, residual=r, act="relu"),
        lambda x, w, b, r: F.relu(F.group_norm(x, 4, w, b) + r),
    ),
    "patch_embed": (
        lambda d: (_t(2, 3, 8, 8, dtype=d), _t(6, 3, 4, 4), _t(6), None, None),
        lambda i, w, b, pos, prefix: ops.patch_embed(i, w, b, pos_embed=pos, prefix=prefix),
        _patch_embed,
    ),
    "patch_embed_with_embeddings": (
        lambda d: (_t(2, 3, 8, 8, dtype=d), _t(6, 3, 4, 4), _t(6), _t(1, 4, 6), _t(1, 1, 6)),
        lambda i, w, b, pos, prefix: ops.patch_embed(i, w, b, pos_embed=pos, prefix=prefix),
        _patch_embed,
    ),
}


def _tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_dtypes_under_autocast(name, dtype):
    make, op, composition = COMPOSITIONS[name]
    arguments = make(dtype)
    with torch.autocast("cpu", LOW):
        got, want = _tuple(op(*arguments)), _tuple(composition(*arguments))
    assert [t.dtype for t in got] == [t.dtype for t in want]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_gradients_have_their_inputs_dtype(name):
    make, op, _ = COMPOSITIONS[name]
    arguments = make(torch.float32)
    inputs = [t.requires_grad_() for t in arguments if t is not None and t.is_floating_point()]
    with torch.autocast("cpu", LOW):
        outputs = _tuple(op(*arguments))
    grads = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), inputs)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_every_op_is_here():
    assert {n for n in ops.NAMES if any(k.startswith(n) for k in COMPOSITIONS)} == set(ops.NAMES)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_values_under_autocast(case):
    """Those of the reference on inputs of the dtype that comes out."""
    with torch.autocast("cpu", LOW):
        outputs = case.call.run(case.spec.public)
    lowered = case.call.map(lambda t: t.to(LOW) if t.is_floating_point() else t)
    for got, wide, narrow in zip(outputs, case.base, lowered.run(case.spec.reference), strict=True):
        want = narrow if got.dtype == LOW else wide
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, check_dtype=False)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float32])
def test_switched_off_inside(case):
    want = case.call.run(case.spec.public)
    with torch.autocast("cpu", LOW), torch.autocast("cpu", enabled=False):
        got = case.call.run(case.spec.public)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cases(tags=["small"], most=1, dtypes=[torch.float64])
def test_float64_is_left_alone(case):
    want = case.call.run(case.spec.public)
    with torch.autocast("cpu", LOW):
        got = case.call.run(case.spec.public)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
