"""What there is no map of is refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import vitfast
from vitfast.errors import InputTypeError, InputValueError, UnsupportedInputError
from vitfast.highres import attention_map


@pytest.mark.parametrize(
    "words, error, message",
    [
        (dict(layer=2), InputValueError, "layer 2: the model has 2"),
        (dict(layer="last"), InputValueError, '"all" or "pool"'),
        (dict(layer=[]), InputValueError, "none is named"),
        (dict(layer=[0, -2]), InputValueError, "twice"),
        (dict(layer=1.0), InputTypeError, "expected an integer"),
        (dict(layer="pool"), UnsupportedInputError, "no AttentionPoolLatent"),
        (dict(head=3), InputValueError, "head 3: the layer has 3"),
        (dict(head="all"), InputValueError, '"mean", "each" or a number'),
        (dict(head=None), InputTypeError, "expected an integer"),
        (dict(query="class"), InputValueError, "query 'class'"),
        (dict(query="dist"), InputValueError, "no distillation token"),
        (dict(query="registers"), InputValueError, "no registers"),
        (dict(query=13), InputValueError, "13 tokens"),
        (dict(query=-1), InputValueError, "13 tokens"),
        (dict(query=[]), InputValueError, "no token"),
        (dict(query=(3, 0)), InputValueError, "the patches are 3 x 4"),
        (dict(query=[(0, 0), 4]), InputTypeError, "row, column"),
        (dict(query=1.5), InputTypeError, "expected an integer"),
        (dict(query=[True]), InputTypeError, "expected an integer"),
    ],
)
def test_bad_words(words, error, message, zoo):
    model = zoo.make("vit_tiny_patch16_224")
    with pytest.raises(error, match=message):
        attention_map(model, zoo.noise(), **words)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(2, 3, 64, 64), InputValueError, "cannot take an image of shape 2x3x64x64"),
        (torch.zeros(3), InputValueError, r"got shape \(3,\)"),
        (torch.zeros(0, 3, 48, 64), InputValueError, "got shape"),
        (torch.zeros(3, 48, 64, dtype=torch.long), InputTypeError, "int64"),
        (np.full((48, 64, 3), 1.5), InputValueError, "between 0 and 1"),
        (np.zeros((3, 48, 64), np.uint8), InputTypeError, "channels last"),
        (torch.zeros(2, 3, 48, 64, dtype=torch.uint8), InputValueError, "uint8"),
        (np.zeros((0, 64, 3), np.uint8), InputValueError, "no pixels"),
        ("no such file.png", InputValueError, "no such file"),
        (None, InputTypeError, "NoneType"),
    ],
)
def test_bad_images(image, error, message, zoo):
    with pytest.raises(error, match=message):
        attention_map(zoo.make("vit_tiny_patch16_224"), image)


def test_a_model_without_class_token(zoo):
    model = zoo.make("vit_base_patch16_siglip_224", **zoo.SMALL)
    with pytest.raises(InputValueError, match="no class token"):
        attention_map(model, zoo.noise())
    assert attention_map(model, zoo.noise(), query="mean").prefix.shape == (2, 1, 1, 0)


@pytest.mark.parametrize(
    "name, message",
    [
        ("test_convnext", "no attention that is known"),
        ("test_resnet", "no attention that is known"),
        ("cait_xxs24_224", "attends by (ClassAttn|TalkingHeadAttn)"),
        ("swinv2_cr_tiny_224", "attends by WindowMultiHeadAttention"),
        ("hiera_tiny_224", "attends by MaskUnitAttention"),
        ("maxvit_nano_rw_256", "attends by AttentionCl|no attention that is known"),
        ("xcit_nano_12_p16_224", "attends by"),
        ("crossvit_tiny_240", "attends by"),
        ("pit_ti_224", "does not tell"),
    ],
)
def test_models_without_maps_say_so(name, message):
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"][1]
    for swapped in (False, True):
        if swapped:
            vitfast.swap(model)
        with pytest.raises(UnsupportedInputError, match=message):
            attention_map(model, torch.zeros(1, 3, size, size), layer=0, query=0)


def test_differential_attention_is_refused(zoo):
    model = zoo.make("vit_tiny_patch16_224", attn_layer="diff")
    with pytest.raises(UnsupportedInputError, match="DiffAttention"):
        attention_map(model, zoo.noise())


def test_a_replaced_forward_is_refused(zoo):
    model = zoo.make("vit_tiny_patch16_224")
    attn = model.blocks[0].attn
    attn.forward = lambda x, **kwargs: x
    with pytest.raises(UnsupportedInputError, match="was replaced"):
        attention_map(model, zoo.noise())
    with pytest.raises(InputTypeError, match="expected a model"):
        attention_map("vit", zoo.noise())  # type: ignore[arg-type]
