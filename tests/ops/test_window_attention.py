"""Windowed attention beside timm's own blocks, and what is particular to windows."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.models import maxxvit
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.errors import BackendUnavailableError
from vitfast.ops import window_attention
from vitfast.ops.window_attention import unfused
from vitfast.ops.window_attention.reference import BackwardCall, Call

HEADS, D = 2, 16
C = HEADS * D
CASES = {
    "shifted": ((14, 14), 7, 3),
    "odd": ((13, 17), 7, 3),
    "plain": ((16, 16), 8, 0),
    "rectangular": ((9, 20), (4, 5), (2, 2)),
    "one_axis": ((10, 7), (4, 7), (2, 0)),
    "smaller": ((5, 3), (7, 7), (3, 3)),
    "smaller_than_the_shift": ((2, 1), (7, 7), (3, 3)),
    "of_fewer_rows_than_the_shift": ((2, 9), (7, 7), (3, 3)),
}


def block(cls, size, window, shift):
    """A timm block in float64 whose parameters all have an effect."""
    g = torch.Generator().manual_seed(0)
    made = cls(C, size, HEADS, window_size=window, shift_size=shift, always_partition=True)
    for p in made.double().parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    return made.eval()


def arguments(b, x):
    """What the op gets from a block's parameters."""
    a = b.attn
    if isinstance(b, SwinTransformerBlock):
        qkv, bias, scale = a.qkv(x), a.qkv.bias, None
        table = a.relative_position_bias_table
    else:
        bias = torch.cat([a.q_bias, a.k_bias, a.v_bias])
        qkv, scale = F.linear(x, a.qkv.weight, bias), a.logit_scale.flatten()
        table = 16 * a.cpb_mlp(a.relative_coords_table).view(-1, HEADS).sigmoid()
    shape = (*x.shape[:3], 3, HEADS, D)
    return qkv.view(shape), b.window_size, b.shift_size, table, bias.view(3, HEADS, D), scale


@pytest.mark.parametrize("window", [(4, 3), (12, 6), (1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_the_definition_is_maxvits(kind, window):
    cfg = maxxvit.MaxxVitTransformerCfg(
        dim_head=D, window_size=window, grid_size=window, head_first=False
    )
    theirs = maxxvit.PartitionAttentionCl(C, kind, cfg).double()
    torch.nn.init.normal_(theirs.attn.rel_pos.relative_position_bias_table)
    x = torch.randn(2, 12, 6, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    qkv = theirs.attn.qkv(x).unflatten(-1, (3, HEADS, D))
    table = theirs.attn.rel_pos.relative_position_bias_table
    for backend in ("reference", "auto"):
        got = window_attention(qkv, window, table=table, grid=kind == "grid", backend=backend)
        got = theirs.attn.proj(got.flatten(-2))
        torch.testing.assert_close(got, theirs._partition_attn(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", [SwinTransformerBlock, SwinTransformerV2Block])
@pytest.mark.parametrize("sizes", CASES)
def test_the_definition_is_timms(cls, sizes):
    size, window, shift = CASES[sizes]
    b = block(cls, size, window, shift)
    x = torch.randn(2, *size, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in "ab")
    want = b._attn(theirs)
    got = b.attn.proj(window_attention(*arguments(b, ours), backend="reference").flatten(-2))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    seed = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    names, parameters = zip(*b.attn.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(out, (leaf, *parameters), seed, allow_unused=True)
        for out, leaf in ((got, ours), (want, theirs))
    ]
    for name, g, w in zip(("x", *names), *grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("roll_first", [True, False])
@pytest.mark.parametrize(("window", "shift"), [((7, 7), (3, 6)), ((4, 3), (3, 0))], ids=str)
@pytest.mark.usefixtures("needs_native")
def test_maps_of_fewer_rows_or_columns_than_the_shift(window, shift, roll_first, cosine):
    g = torch.Generator().manual_seed(0)
    positions = (2 * window[0] - 1) * (2 * window[1] - 1)
    for high, wide in itertools.product((1, 2, 3, 5, 7, 8), repeat=2):
        shapes = ((1, high, wide, 3, HEADS, 8), (positions, HEADS), (3, HEADS, 8))
        exact = [torch.randn(s, generator=g).double().requires_grad_() for s in shapes]
        exact += [torch.tensor([1.4, 2.4]).double().requires_grad_()] if cosine else []
        leaves = [t.detach().float().requires_grad_() for t in exact]
        results = []
        for backend, given in (("cpu", leaves), ("reference", exact)):
            out = window_attention(
                given[0], window, shift, *given[1:], roll_first=roll_first, backend=backend
            )
            seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            results.append((out, *torch.autograd.grad(out, given, seed)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(
                got.double(), want, rtol=1e-4, atol=1e-4, msg=f"{high} x {wide}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_backend_on_a_gpu(dtype):
    """Scores are float32 without float32 copies of q, k, v and the gradient; nothing waits."""
    with FakeTensorMode(), Products() as products:
        qkv = torch.empty(2, 9, 7, 3, HEADS, D, device="cuda", dtype=dtype)
        table = torch.empty(49, HEADS, device="cuda")
        pad = torch.empty(3, HEADS, D, device="cuda", dtype=dtype)
        call = Call(qkv, 4, 4, 2, 1, table, pad, None, None, True, False, save_stats=True)
        out, stats = unfused.forward(call)
        assert out.shape == (2, 9, 7, HEADS, D) and out.dtype == dtype and out.is_contiguous()
        assert stats.shape == call.stats_shape and stats.dtype == torch.float32
        options = call._asdict()
        del options["save_stats"]
        found = unfused.backward(BackwardCall(out, stats, **options, wanted=[True] * 3 + [False]))
        for got, of in zip(found, (qkv, table, pad), strict=False):
            assert (got.shape, got.dtype, got.device) == (of.shape, of.dtype, of.device)
            assert got.is_contiguous()
    wide = torch.float32
    assert products == [(dtype, wide), (dtype, dtype), (dtype, wide), (dtype, wide)] + 3 * [
        (dtype, dtype)
    ]


class Products(TorchDispatchMode, list):
    """Dtypes of operands and result of the batched products within."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.bmm:
            assert args[0].dtype == args[1].dtype
            self.append((args[0].dtype, result.dtype))
        return result


def test_triton_refuses_a_shift_that_goes_round_the_map_more_than_once():
    qkv = torch.randn(1, 2, 9, 3, 1, 8)
    with pytest.raises(BackendUnavailableError, match="goes round the map more than once"):
        window_attention(qkv, (7, 7), (3, 3), backend="triton")


def test_more_windows_than_a_grid_has_rows():
    qkv = torch.randn(1, 264, 256, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    assert 264 * 256 > 65_535
    got = window_attention(qkv, (1, 1))  # each sees itself alone
    torch.testing.assert_close(got, qkv[:, :, :, 2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_windows_are_apart(size):
    """A token's change is felt in its window, and nowhere else."""
    qkv = torch.randn(1, *size, 3, 1, 8, generator=torch.Generator().manual_seed(0))
    changed = qkv.clone()
    changed[0, 5, 5] += 1
    felt = (window_attention(qkv, (4, 4)) != window_attention(changed, (4, 4))).any(-1)[0, :, :, 0]
    want = torch.zeros(size, dtype=torch.bool)
    want[4:8, 4:8] = True
    assert torch.equal(felt, want)


@pytest.mark.usefixtures("needs_native")
def test_nothing_as_large_as_the_map_is_made_beside_the_output():
    """Forward in inference: one allocation of the map's size, whatever is folded into it."""
    from torch.profiler import ProfilerActivity, profile

    qkv = torch.randn(1, 60, 60, 3, HEADS, D)
    table, pad = torch.randn(169, HEADS), torch.randn(3, HEADS, D)
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        out = window_attention(qkv, (7, 7), (3, 3), table, pad, backend="cpu")
    made = sum(e.self_cpu_memory_usage for e in seen.key_averages() if e.self_cpu_memory_usage > 0)
    assert made < 1.1 * out.numel() * out.element_size()


def table_gradient(qkv, window, grad, rounded):
    """Of one window without bias; `rounded`: delta is taken from the output in qkv's dtype."""
    q, k, v = qkv.flatten(1, 2)[0].double().permute(1, 2, 0, 3)
    g = grad.flatten(1, 2)[0].double().transpose(0, 1)
    p = (q @ k.mT * qkv.shape[-1] ** -0.5).softmax(-1)
    out = (p @ v).to(qkv.dtype).double() if rounded else p @ v
    ds = p * (g @ v.mT - (g * out).sum(-1, keepdim=True))
    table = torch.zeros((2 * window - 1) ** 2, qkv.shape[-2], dtype=ds.dtype, requires_grad=True)
    y, x = torch.arange(window**2).div(window, rounding_mode="floor"), torch.arange(window**2)
    x = x % window
    at = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    return torch.autograd.grad(table[at].permute(2, 0, 1), table, ds)[0]


@pytest.mark.parametrize("window", [4, 7, 9, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("needs_native")
def test_a_table_gains_nothing_in_total(window, dtype):
    """A query's dS sum to zero, and so does the table's gradient: also in half precision.

    The values are far from zero, so that the output's rounding is far above what it would take.
    """
    g = torch.Generator().manual_seed(window)
    qkv = torch.randn(1, window, window, 3, HEADS, D, generator=g)
    qkv[:, :, :, 2] += 8
    grad = torch.randn(1, window, window, HEADS, D, generator=g).to(dtype)
    qkv = qkv.to(dtype)
    table = torch.zeros((2 * window - 1) ** 2, HEADS, requires_grad=True)
    out = window_attention(qkv, (window, window), table=table, backend="cpu")
    found = torch.autograd.grad(out, table, grad)[0].double()

    def balanced(dtable):
        return (dtable.sum(0).abs() < 1e-5 * dtable.abs().sum(0)).all()

    exact, wrong = (table_gradient(qkv, window, grad, rounded) for rounded in (False, True))
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    assert balanced(exact) and balanced(found)
    assert dtype == torch.float32 or not balanced(wrong)


PADDED = dict(size=(2, 2), window=8, shift=0)
GRADIENTS = {
    "bias_around_8": dict(size=(16, 16), window=4, shift=2, cosine=True, bias=8.0),
    "values_around_3": dict(size=(16, 16), window=4, shift=2, cosine=True, values=3.0),
    "mostly_padding": PADDED,
    "mostly_padding_cosine": PADDED | dict(cosine=True, bias=8.0),
}


@pytest.mark.parametrize("draw", GRADIENTS)
@pytest.mark.usefixtures("needs_native")
def test_what_scores_or_values_have_in_common_costs_no_gradient_its_accuracy(draw):
    """Rms errors over 16 draws are at most 1.6 times PyTorch's: no more than chance and order."""

    def errors(seed, size, window, shift, bias=0.0, values=0.0, cosine=False):
        g = torch.Generator().manual_seed(seed)
        positions, dim = (2 * window - 1) ** 2, 12
        shapes = ((1, *size, 3, HEADS, dim), (positions, HEADS), (3, HEADS, dim))
        qkv, table, pad = (torch.randn(s, generator=g) for s in shapes)
        qkv[..., 2, :, :] += values
        leaves = [qkv, table + bias, pad, *([torch.full((HEADS,), 2.3)] if cosine else [])]
        wanted = 3 if window > size[0] else 2  # no gradient of padding that is not there
        weights = torch.randn(1, *size, HEADS, dim, generator=g)
        found = []
        runs = (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
        for backend, dtype in runs:
            given = [t.to(dtype).requires_grad_() for t in leaves]
            out = window_attention(given[0], (window,) * 2, (shift,) * 2, *given[1:],
                                   backend=backend)  # fmt: skip
            found.append(torch.autograd.grad(out, given[:wanted], weights.to(dtype)))
        ours, base, exact = found
        return torch.tensor([
            [float((t[i].double() - exact[i]).norm() / exact[i].norm()) for t in (ours, base)]
            for i in range(wanted)
        ])  # fmt: skip

    drawn = torch.stack([errors(seed, **GRADIENTS[draw]) for seed in range(16)])
    ours, base = drawn.square().mean(0).sqrt().unbind(-1)
    assert (ours <= 1.6 * base).all(), (ours / base).tolist()
