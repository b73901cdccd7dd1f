"""Vectors are the model's own, in order, whatever the threads and the broken among them."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vitfast
from vitfast.embedding import embedder as module
from vitfast.errors import InputTypeError, InputValueError


def by_hand(model, pictures, size=32):
    """timm's preprocessing and timm's own forward, one image at a time, in float32."""
    config = resolve_data_config({"input_size": (3, size, size)}, model=model)
    transform = create_transform(**config)
    with torch.no_grad():
        rows = [model(transform(Image.fromarray(p))[None])[0] for p in pictures]
    return torch.stack(rows).numpy()


def timm_twin(embedder, name="test_vit", **kwargs):
    """timm's model with the embedder's weights."""
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    model.load_state_dict(embedder.model.state_dict())
    return model


def test_vectors_are_timms(small, pictures):
    embedder = small(dtype="float32", normalize=False)
    assert embedder.swapped.swapped
    expected = by_hand(timm_twin(embedder, img_size=32), pictures)
    found = embedder.embed(pictures)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * abs(expected).max())


def test_they_have_unit_length_and_the_dtype(small, pictures):
    plain = small(dtype="float32", normalize=False).embed(pictures)
    assert abs(np.linalg.norm(plain, axis=1) - 1).min() > 0.1
    unit = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    for dtype, error in (("float32", 1e-6), ("float16", 1e-3)):
        found = small(dtype=dtype).embed(pictures)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(np.float32), unit, rtol=0, atol=error)


@pytest.mark.parametrize("pool", [None, "token", "avg", lambda features: features[:, -1]])
def test_pools(small, pictures, pool):
    embedder = small(pool=pool, dtype="float32", normalize=False)
    model = embedder.model
    transform = embedder.transform
    x = torch.stack([transform(Image.fromarray(p)) for p in pictures])
    with torch.no_grad():
        features = model.forward_features(x)
        expected = {
            None: lambda: model(x),
            "token": lambda: features[:, 0],
            "avg": lambda: features[:, model.num_prefix_tokens :].mean(1),
        }.get(pool, lambda: features[:, -1])()
    np.testing.assert_allclose(embedder.embed(pictures), expected.numpy(), rtol=1e-3, atol=1e-4)


def test_features_of_rows_and_columns_are_averaged(pictures):
    for name, axes in (("test_convnext", (2, 3)), ("swin_tiny_patch4_window7_224", (1, 2))):
        kwargs = {"img_size": 64}
        if name.startswith("swin"):
            kwargs |= {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
        embedder = vitfast.Embedder(
            name, pool="avg", dtype="float32", normalize=False, model_kwargs=kwargs, device="cpu"
        )
        x = torch.stack([embedder.transform(Image.fromarray(p)) for p in pictures[:2]])
        assert x.shape[-2:] == (64, 64)
        with torch.no_grad():
            expected = embedder.model.forward_features(x).mean(axes)
        found = embedder.embed(pictures[:2])
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_model_with_a_classifier_gives_what_it_reads(pictures):
    model = timm.create_model("test_vit", img_size=32).eval()
    embedder = vitfast.Embedder(model, dtype="float32", normalize=False)
    x = torch.stack([embedder.transform(Image.fromarray(p)) for p in pictures])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True).numpy()
    found = embedder.embed(pictures)
    assert found.shape == (10, model.num_features)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert embedder.name == "test_vit"


def test_one_channel(pictures):
    kwargs = {"img_size": 32, "in_chans": 1}
    embedder = vitfast.Embedder("test_vit", model_kwargs=kwargs, device="cpu")
    assert embedder.embed(pictures[:2]).shape == (2, embedder.dim)


def test_order_survives_threads_that_finish_in_any(small, pictures, monkeypatch):
    decode, random_ = module.decode, random.Random(0)

    def slow(image, channels):
        time.sleep(random_.random() / 50)
        return decode(image, channels)

    embedder = small(workers=6, dtype="float32")
    expected = embedder.embed(pictures)
    monkeypatch.setattr(module, "decode", slow)
    found = list(embedder.stream((f"id {i}", p) for i, p in enumerate(pictures)))
    assert [one.id for one in found] == [f"id {i}" for i in range(10)]
    np.testing.assert_allclose(np.stack([one.vector for one in found]), expected, atol=1e-6)


def test_broken_ones_are_told_in_their_place(small, pictures):
    items = [("a", pictures[0]), ("b", b"x"), ("c", pictures[1]), ("d", "/none"), ("e", b"")]
    for batch_size in (1, 2, 4):
        found = list(small(batch_size=batch_size).stream(items))
        assert [(one.id, one.vector is None, one.error is None) for one in found] == [
            (name, name in "bde", name in "ac") for name, _ in items
        ]
        assert [one.error for one in found if one.error] == [
            "no image that Pillow knows",
            "cannot be read: No such file or directory",
            "an empty file",
        ]
    with pytest.raises(InputValueError, match="image 1: no image"):
        small().embed([image for _, image in items])
    with pytest.raises(InputValueError, match=r"image 0 \(/none\): cannot be read"):
        small().embed(["/none"])


def test_whatever_a_decoder_raises_is_told(small, pictures, monkeypatch):
    decode = module.decode

    def fails(image, channels):
        if image is pictures[3]:
            raise ZeroDivisionError("a plugin's own")
        return decode(image, channels)

    monkeypatch.setattr(module, "decode", fails)
    found = list(small().stream(enumerate_as_text(pictures)))
    assert [one.error for one in found if one.error] == ["broken: a plugin's own"]
    assert sum(one.vector is not None for one in found) == 9


def enumerate_as_text(pictures):
    return ((str(i), p) for i, p in enumerate(pictures))


def test_no_more_is_taken_than_two_batches_ahead(small, pictures):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield str(taken[-1]), pictures[0]

    embedder = small(batch_size=2, workers=3)
    stream = embedder.stream(endless())
    for got in range(1, 8):
        next(stream)
        assert len(taken) <= got + 2 * 2 + 2 + 3
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("vitfast-decode")]


def test_decoding_goes_on_while_a_batch_is_computed(small, pictures, monkeypatch):
    embedder = small(batch_size=2, workers=2)
    decode, compute = module.decode, embedder._compute
    computing, overlapped = threading.Event(), threading.Event()

    def watched(image, channels):
        if computing.is_set():
            overlapped.set()
        time.sleep(0.005)
        return decode(image, channels)

    def slow(tensors):
        computing.set()
        overlapped.wait(10)
        found = compute(tensors)
        computing.clear()
        return found

    monkeypatch.setattr(module, "decode", watched)
    monkeypatch.setattr(embedder, "_compute", slow)
    started = time.monotonic()
    assert len(list(embedder.stream(enumerate_as_text(pictures)))) == 10
    assert overlapped.is_set() and time.monotonic() - started < 10


def test_vectors_without_a_direction_are_told(small, pictures):
    def pool(value):
        return lambda features: torch.full((len(features), 3), value)

    def errors(**options):
        return {one.error for one in small(**options).stream([("a", pictures[0])])}

    assert errors(pool=pool(0.0)) == {"its vector is zero and has no direction"}
    assert errors(pool=pool(float("nan"))) == {"its vector has values that are not finite"}
    assert errors(pool=pool(1e5), normalize=False) == {
        "its vector is beyond float16: use dtype float32"
    }
    assert errors(pool=pool(1e5)) == errors(pool=pool(0.0), normalize=False) == {None}


def test_weights_of_a_name_are_seeded_and_leave_the_users_random_numbers(small):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = small(seed=1).metadata
    assert (torch.rand(3) == expected).all()
    assert first["source"] == {"from": "random", "seed": 1}
    assert small(seed=1).metadata == first
    assert small(seed=2).metadata["weights_sha256"] != first["weights_sha256"]


def test_the_hash_is_of_the_weights_alone(small):
    embedder = small(swap=False)
    before = embedder.metadata["weights_sha256"]
    vitfast.swap(embedder.model)
    assert embedder.metadata["weights_sha256"] == before
    with torch.no_grad():
        embedder.model.norm.bias[3] += 1e-6
    assert embedder.metadata["weights_sha256"] != before


def test_an_embedder_is_made_again_from_its_facts(small, pictures, digits):
    for embedder in (
        small(seed=3, pool="avg"),
        small(normalize=False, dtype="float32"),
        vitfast.Embedder(
            digits.model,
            checkpoint=digits.checkpoint,
            model_kwargs=digits.model_kwargs,
            device="cpu",
        ),
    ):
        again = vitfast.Embedder.like(embedder.metadata, device="cpu")
        assert (again.embed(pictures) == embedder.embed(pictures)).all()
    with pytest.raises(InputValueError, match="weights_sha256 is"):
        vitfast.Embedder.like({**small().metadata, "weights_sha256": "0"}, device="cpu")
    with pytest.raises(InputValueError, match="made in Python"):
        vitfast.Embedder.like(small(pool=lambda features: features[:, 0]).metadata)


def test_nothing_is_an_empty_array(embedder):
    assert embedder.embed([]).shape == (0, embedder.dim)
    assert embedder.embed([]).dtype == np.float16
    assert list(embedder.stream([])) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "vit_bse_patch16_224"}, "did you mean"),
        ({"model": 3}, "expected a model's name"),
        ({"dtype": "bfloat16"}, "expected one of float16, float32"),
        ({"pool": "max"}, "pool 'max'"),
        ({"batch_size": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"device": "gpu"}, "device"),
        ({"pretrained": True, "checkpoint": "x"}, "one of them"),
        ({"checkpoint": "/no/such.pth"}, "no such file"),
        ({"checkpoint": "/"}, "a folder"),
        ({"model_kwargs": {"img_size": 33}}, "test_vit embeds no image: .* divisible"),
        ({"model_kwargs": {"depht": 3}}, "depht"),
        ({"model": torch.nn.Linear(2, 2), "pretrained": True}, "go with a model's name"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises((InputValueError, InputTypeError), match=message):
        vitfast.Embedder(**{"model": "test_vit", "device": "cpu", **options}).dim  # noqa: B018


def test_what_gives_no_vector_says_so(small, pictures):
    with pytest.raises(InputValueError, match="expected \\[B, D\\]"):
        small(pool=lambda features: features).embed(pictures)
    with pytest.raises(InputValueError, match="no class token"):
        vitfast.Embedder("test_convnext", pool="token", device="cpu").embed(pictures)
    plain = small(transform=lambda image: torch.zeros(3, image.height, image.width))
    with pytest.raises(InputValueError, match="several shapes"):
        plain.embed(pictures)
    with pytest.raises(InputTypeError, match="list of images"):
        small().embed("a.png")
