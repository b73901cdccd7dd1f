"""Windowed attention beside timm's own blocks, and what is particular to windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models import maxxvit
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block

from vitfast.ops import window_attention

HEADS, D = 2, 16
C = HEADS * D
CASES = {
    "shifted": ((14, 14), 7, 3),
    "odd": ((13, 17), 7, 3),
    "plain": ((16, 16), 8, 0),
    "rectangular": ((9, 20), (4, 5), (2, 2)),
    "one_axis": ((10, 7), (4, 7), (2, 0)),
    "smaller": ((5, 3), (7, 7), (3, 3)),
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
