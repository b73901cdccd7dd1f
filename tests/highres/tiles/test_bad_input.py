"""What cannot be is one sentence; what looks odd but can be works."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitfast.errors import InputTypeError, InputValueError, UnsupportedInputError
from vitfast.highres import tiled

IMAGE = torch.randn(3, 100, 132, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(overlap=1.0), InputValueError, "overlap=1.0 must be a share"),
        (dict(tile=0), InputValueError, "below 1 pixel"),
        (dict(tile=8), InputValueError, "tile=8 is less than the 16 pixels"),
        (dict(batch=0), InputValueError, "batch=0 must be at least 1"),
        (dict(batch=None), InputTypeError, "batch is a whole number"),
        (dict(stride=1.5), InputTypeError, "stride is a whole number"),
        (dict(margin=-1), InputValueError, "margin=-1 must be at least 0"),
        (dict(margin=64), InputValueError, "margin=64 takes an overlap of twice"),
        (dict(blend="gaussian"), InputValueError, "blend='gaussian' is none of cosine, average"),
        (dict(output="tokens"), InputValueError, "output='tokens' is none of features"),
        (dict(output=7), InputTypeError, "output is a name or a function"),
        (dict(layout="NHWC"), InputValueError, "layout='NHWC' is none of auto"),
        (dict(on_error="ignore"), InputValueError, "neither 'raise' nor 'keep'"),
        (dict(mean=(0.5, 0.5)), InputValueError, "mean has 2 values for images of 3"),
        (dict(mean=0.5, transform=lambda x: x), InputValueError, "not both"),
        (dict(transform=lambda x: x[..., ::2, ::2]), InputValueError, "transform must keep"),
        (dict(resume="state.json", output="features"), InputValueError, "resume needs an out"),
    ],
)
def test_bad_options_are_one_sentence(vit, options, error, message):
    with pytest.raises(error, match=message) as caught:
        tiled(vit, IMAGE, **{"tile": 64} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, options, error, message",
    [
        (lambda x: x.mean((2, 3)), dict(output="features"), InputTypeError, "forward_intermediate"),
        (nn.Identity().eval(), dict(output="pooled"), InputTypeError, "forward_features and"),
        (lambda x: x, dict(output="logits"), UnsupportedInputError, "a vector .* was asked for"),
        (lambda x: x.flatten(2), {}, UnsupportedInputError, "neither a map"),
        (lambda x: x.argmax(1), {}, UnsupportedInputError, "neither a map"),
        (lambda x: x[:0], {}, UnsupportedInputError, "neither a map"),
        (lambda x: (x, x), {}, UnsupportedInputError, "one tensor, not a tuple"),
        (lambda x: x[..., 1:-1, 1:-1], {}, UnsupportedInputError, "no fixed fraction"),
        (lambda x: x[..., ::4, ::4][..., 1:, 1:], {}, UnsupportedInputError, "no fixed fraction"),
        (lambda x: x[..., ::11, ::11], {}, UnsupportedInputError, "any stride from 10 to 12"),
        (nn.Identity(), {}, InputValueError, "training mode"),
        (None, {}, InputTypeError, "a NoneType cannot be"),
    ],
)
def test_a_model_without_such_an_output_is_one_sentence(model, options, error, message):
    with pytest.raises(error, match=message) as caught:
        tiled(model, IMAGE, 64, **options)
    assert "\n" not in str(caught.value)


def test_a_vector_for_an_out_that_holds_a_map(vit):
    with pytest.raises(InputValueError, match="shape .* output is"):
        tiled(vit, IMAGE, 64, out=np.empty((7, 7, 9), np.float32))


def test_a_model_of_a_fixed_size_names_it():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    with pytest.raises(InputValueError, match=r"refused a tile of 512 x 512.*give tile=\(64, 64\)"):
        tiled(model, IMAGE)
    assert tiled(model, IMAGE[:, :40, :50], 64, output="features").shape[1:] == (3, 4)


def test_a_stride_is_found_where_a_model_does_not_tell():
    def model(x):  # a stem that rounds up, as ResNet's
        return nn.functional.max_pool2d(x, 1, 16)

    image = torch.randn(3, 530, 700)
    # 500 is no multiple of 16: 32 cells, which no other stride gives.
    assert torch.equal(tiled(model, image, 500, 0.25), image[:, ::16, ::16])
    with pytest.raises(UnsupportedInputError, match="give stride="):
        tiled(model, image, 100)
    assert torch.equal(tiled(model, image, 100, stride=16), image[:, ::16, ::16])


def test_a_tile_of_no_multiple_is_cut_to_one(vit):
    found = tiled(vit, IMAGE, 70, output="features")
    assert torch.equal(found, tiled(vit, IMAGE, 64, output="features"))
