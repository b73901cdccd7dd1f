"""Position biases kept between calls: under autograd, and in forked children."""

from __future__ import annotations

import os
import sys

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2

from vitfast.layers.reading.position import _KEPT, swin_v2_table
from vitfast.runtime import native
from vitfast.swap import swap


@pytest.mark.skipif(bool(native.reasons()), reason="no native extension")
def test_a_bias_kept_in_inference_mode_serves_no_backward():
    options = dict(img_size=64, window_size=4, depths=(2, 2), embed_dim=24, num_heads=(2, 4))
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=7, **options).eval()
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    swap(model)
    model.requires_grad_(False)  # a swap keeps what is frozen before
    with torch.inference_mode():
        model(x)
    (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(bool(native.reasons()), reason="no native extension")
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no fork")
@torch.no_grad()
def test_a_forked_child_begins_with_none():
    mlp = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    swin_v2_table(mlp, torch.randn(1, 3, 3, 2), 2)
    assert mlp in _KEPT
    child = os.fork()
    if child == 0:
        os._exit(len(_KEPT))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mlp in _KEPT


@pytest.mark.usefixtures("needs_native")
def test_coordinates_in_channels_last_order():
    """As `model.to(memory_format=torch.channels_last)` leaves every buffer of four dimensions."""
    model = SwinTransformerV2(
        img_size=64, window_size=8, embed_dim=32, depths=(2, 1), num_heads=(1, 2), num_classes=0
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        swap(model)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
