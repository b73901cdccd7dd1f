"""Maps of windows beside the dense matrices of timm's own windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition

import vitfast
from vitfast.errors import InputValueError, UnsupportedInputError
from vitfast.highres import attention_map, attention_rollout


def build(zoo, name: str, size: tuple[int, int], **kwargs):
    return zoo.make(
        name,
        size,
        None,
        depths=(2, 2),
        embed_dim=48,
        num_heads=(2, 4),
        window_size=(4, 3),
        **kwargs,
    )


def placed(block, windows: torch.Tensor, size: tuple[int, int], batch: int) -> torch.Tensor:
    """Attention of windows [B * windows, heads, A, A] as [B, heads, N, N], by numbered tokens that
    are shifted, padded and cut as timm does it with a map."""
    (rows, columns), (high, wide) = size, block.window_size
    numbers = torch.arange(1.0, rows * columns + 1).view(1, rows, columns, 1)
    numbers = torch.roll(numbers, [-s for s in block.shift_size], (1, 2))
    numbers = F.pad(numbers, (0, 0, 0, -columns % wide, 0, -rows % high))
    where = window_partition(numbers, (high, wide)).view(-1, high * wide).long() - 1
    whole = torch.zeros(batch, windows.shape[1], rows * columns, rows * columns)
    by_window = windows.unflatten(0, (batch, -1))
    for number, tokens in enumerate(where):
        inside = (tokens >= 0).nonzero().flatten()
        at = tokens[inside]
        part = by_window[:, number][:, :, inside[:, None], inside]
        whole[:, :, at[:, None], at] = part
    return whole


@pytest.mark.parametrize("size, dynamic", [((64, 96), True), ((56, 100), False)])  # with padding
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_maps_of_windows(name, size, dynamic, zoo):
    model, image = build(zoo, name, size), zoo.noise(size=size)
    blocks = [m for m in model.modules() if hasattr(m, "shift_size")]
    for block in blocks:
        block.dynamic_mask = dynamic
    assert any(any(block.shift_size) for block in blocks)
    expected = zoo.dense(model, image)
    for swapped in (False, True):
        if swapped:
            vitfast.swap(model)
        for layer, (block, windows) in enumerate(zip(blocks, expected, strict=True)):
            rows, columns = block.input_resolution
            every = [(row, column) for row in range(rows) for column in range(columns)]
            found = attention_map(model, image, layer, every, "each")
            assert found.prefix.shape[-1] == 0
            right = placed(block, windows, (rows, columns), 2)
            torch.testing.assert_close(found.patches.flatten(-2), right, rtol=0, atol=1e-5)


def test_windows_have_patches_only(zoo):
    model, image = build(zoo, "swin_tiny_patch4_window7_224", (64, 96)), zoo.noise(size=(64, 96))
    for query in ("cls", "mean", 3, [0, 1]):
        with pytest.raises(InputValueError, match="name patches as"):
            attention_map(model, image, query=query)
    with pytest.raises(InputValueError, match="the patches are 8 x 12"):
        attention_map(model, image, query=(8, 0))
    with pytest.raises(UnsupportedInputError, match="within windows"):
        attention_rollout(model, image, (0, 0))
    sizes = [m.patches.shape[-2:] for m in attention_map(model, image, [0, 3], (1, 1))]
    assert sizes == [(16, 24), (8, 12)]


def test_a_changed_block_of_windows_is_refused(zoo):
    model, image = build(zoo, "swin_tiny_patch4_window7_224", (64, 96)), zoo.noise(size=(64, 96))
    attn = model.layers[0].blocks[0].attn
    hook = attn.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    with pytest.raises(UnsupportedInputError, match="not as timm built it"):
        attention_map(model, image, 0, (0, 0))
    hook.remove()
    attn.softmax = torch.nn.Softmax(1)
    with pytest.raises(UnsupportedInputError, match="softmax"):
        attention_map(model, image, 0, (0, 0))
