"""What a block keeps in memory for its backward, counted by saved-tensor hooks."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block

import vitfast


def saved_units(block, x, **arguments):
    """Bytes that autograd keeps beside parameters, each storage once, in units of X.

    X: a tensor of x's size in 2-byte elements.
    """
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = (storage.nbytes(), t)  # kept alive: addresses are reused
        return t

    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1) * 2
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        block(x, **arguments)
    total = sum(size for size, _ in found.values())
    # timm's autocast keeps copies of the weights, which are no activations.
    copies = sum(
        size for size, t in found.values() if t.dtype == torch.bfloat16 and t.shape[0] != x.shape[0]
        and t.numel() * 2 == size and t.shape in {p.shape[::-1] for p in block.parameters()}
    )  # fmt: skip
    return (total - min(copies, weights)) / (2 * x.numel())


@pytest.mark.parametrize(
    ("name", "most"),
    [("vit_base_patch16_224", 13), ("deit3_base_patch16_224", 15), ("beit_base_patch16_224", 15)],
)
def test_a_block_under_bfloat16_autocast(name, most):
    """Two residual streams in float32, qkv, attention's result and one hidden tensor: 12 units.

    LayerScale's gradient takes each branch too.
    """
    model = timm.create_model(name, depth=1).train()
    block, arguments = model.blocks[0], {}
    if "beit" in name:
        with torch.no_grad():
            block.attn.window_size = None
            block.attn.relative_position_bias_table = None
    x = torch.randn(4, 50, 768, requires_grad=True)
    before = saved_units(block, x, **arguments)
    vitfast.swap(model)
    after = saved_units(block, x, **arguments)
    assert after <= most, f"{after:.2f} X, timm {before:.2f} X"
    assert before > 17, "timm's own block is what this is measured against"


@pytest.mark.parametrize(
    ("options", "most", "theirs"),
    [
        ({}, 8.1, 12),
        ({"conv_mlp": True}, 8.1, 12),
        ({"use_grn": True, "ls_init_value": None}, 7.1, 19),
    ],
    ids=str,
)
def test_a_convolutional_block_under_bfloat16_autocast(options, most, theirs):
    """x in float32 (2 units), the norm's result, fc1's (4), the branch that gamma scales."""
    block = ConvNeXtBlock(96, **options).train()
    x = torch.randn(4, 96, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    before = saved_units(block, x)
    vitfast.swap(block)
    after = saved_units(block, x)
    assert after <= most, f"{after:.2f} X, timm {before:.2f} X"
    assert before > theirs, "timm's own block is what this is measured against"


@pytest.mark.parametrize("cls", [SwinTransformerBlock, SwinTransformerV2Block])
def test_a_shifted_block_under_bfloat16_autocast(cls):
    """As above; V2 keeps the branches that it normalises, and rounds its residual streams."""
    block = cls(96, (14, 14), num_heads=3, window_size=7, shift_size=3).train()
    x = torch.randn(4, 14, 14, 96, requires_grad=True)
    before = saved_units(block, x)
    vitfast.swap(block)
    after = saved_units(block, x)
    assert after <= 14, f"{after:.2f} X, timm {before:.2f} X"
    assert before > 22, "timm's own block is what this is measured against"
