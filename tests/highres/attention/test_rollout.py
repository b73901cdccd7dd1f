"""Rollout of single tokens beside the product of dense matrices."""

from __future__ import annotations

import pytest
import torch

import vitfast
from vitfast.errors import InputTypeError, InputValueError, UnsupportedInputError
from vitfast.highres import attention_rollout
from vitfast.highres.attention import queries_keys, rows

MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_dinov3": dict(embed_dim=96, num_heads=3),
    "beit_base_patch16_224": dict(embed_dim=96, num_heads=3),
}


def dense_rollout(layers: list[torch.Tensor], residual: float = 0.5) -> torch.Tensor:
    """The product over layers, the last one first, [B, N, N]."""
    eye = torch.eye(layers[0].shape[-1])
    product = eye
    for attention in layers:
        product = ((1 - residual) * attention.mean(1) + residual * eye) @ product
    return product


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_dense_product(name, swapped, zoo, monkeypatch):
    model, image = zoo.make(name, depth=4, **MODELS[name]), zoo.noise()
    expected = dense_rollout(zoo.dense(model, image))
    if swapped:
        vitfast.swap(model)
    prefix = model.num_prefix_tokens
    for query, tokens in (("cls", [0]), ([5, 0], [5, 0]), ((1, 2), [prefix + 6])):
        found = attention_rollout(model, image, query)
        assert found.layer == "rollout"
        assert found.patches.shape == (2, 1, len(tokens), 3, 4)
        right = expected[:, None, tokens]
        torch.testing.assert_close(zoo.joined(found), right, rtol=0, atol=1e-5)
    monkeypatch.setattr(rows, "QUERIES", 5)
    monkeypatch.setattr(queries_keys, "TOKENS", 5)
    found = attention_rollout(model, image)
    torch.testing.assert_close(zoo.joined(found), expected[:, None, [0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual", [0, 0.2])
def test_the_share_of_the_residual(residual, zoo):
    model, image = zoo.make("vit_tiny_patch16_224", depth=3), zoo.noise()
    expected = dense_rollout(zoo.dense(model, image), residual)
    found = attention_rollout(model, image, "cls", residual)
    torch.testing.assert_close(zoo.joined(found), expected[:, None, [0]], rtol=0, atol=1e-5)


def test_bad_words(zoo):
    model, image = zoo.make("vit_tiny_patch16_224"), zoo.noise()
    for residual in (1, -0.1, "x", True, float("nan")):
        with pytest.raises(InputValueError, match="residual"):
            attention_rollout(model, image, residual=residual)
    with pytest.raises(InputValueError, match="query 'mean'"):
        attention_rollout(model, image, "mean")
    with pytest.raises(InputTypeError, match="expected a model"):
        attention_rollout(None, image)  # type: ignore[arg-type]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_of_other_tokens_have_no_rollout(zoo):
    model = zoo.make("vit_tiny_patch16_224")
    model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0][:, :5],))
    with pytest.raises(UnsupportedInputError):
        attention_rollout(model, zoo.noise())
