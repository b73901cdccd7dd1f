"""Trained weights: what swapping leaves of a classifier's accuracy, and what vectors retrieve."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitfast


@pytest.fixture(scope="module", params=("vit", "swin", "convnext"))
def digits(request, trained_on_digits):
    return trained_on_digits(request.param)


@pytest.fixture(scope="module")
def embedder(digits):
    return vitfast.Embedder(
        digits.model, checkpoint=digits.checkpoint, model_kwargs=digits.model_kwargs, device="cpu"
    )


def test_accuracy_before_and_after_swap(digits, embedder):
    model = timm.create_model(digits.model, num_classes=10, **digits.model_kwargs).eval()
    model.load_state_dict(torch.load(digits.checkpoint, weights_only=True))
    images = [Image.fromarray(image).convert("RGB") for image in digits.images]
    x = torch.stack([embedder.transform(image) for image in images])
    labels = torch.from_numpy(digits.labels)
    with torch.no_grad():
        before = model(x)
        assert vitfast.swap(model).counts["blocks_swapped"] == 4
        after = model(x)
    accuracy = (before.argmax(1) == labels).float().mean().item()
    assert accuracy >= 0.96
    assert (after.argmax(1) == before.argmax(1)).all()
    assert 0 < (after - before).abs().max() < 1e-4 * before.abs().max()


def precision(vectors, labels, top=10):
    """The share of the nearest that have the label of what they were found by, itself left out."""
    cosines = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argsort(-cosines, axis=1)[:, :top]
    return (labels[near] == labels[:, None]).mean()


def test_what_vectors_retrieve(digits, embedder, tmp_path):
    vectors = embedder.embed(list(digits.images))
    assert precision(vectors, digits.labels) > 0.93
    pixels = digits.images.reshape(len(digits.images), -1).astype(np.float32)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    assert precision(vectors, digits.labels) > precision(pixels, digits.labels)
    embedder.write({str(i): image for i, image in enumerate(digits.images)}, tmp_path)
    found = vitfast.embedding.Archive(tmp_path).search(vectors, 11)
    right = [digits.labels[int(h.id)] == digits.labels[i] for i, hits in enumerate(found)
             for h in hits if h.id != str(i)]  # fmt: skip
    assert np.mean(right) > 0.93
    untrained = vitfast.Embedder(digits.model, model_kwargs=digits.model_kwargs, device="cpu")
    assert precision(untrained.embed(list(digits.images)), digits.labels) < 0.9
