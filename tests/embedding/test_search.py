"""Search against a sort of all cosines, over shards, chunks, ties and queries of any length."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest

from vitfast.embedding import Archive, search
from vitfast.errors import InputValueError

needs_usearch = pytest.mark.skipif(
    importlib.util.find_spec("usearch") is None, reason="usearch is not installed"
)


class Given:
    """An embedder whose images are their vectors."""

    def __init__(self, embedder, **facts):
        self.metadata = {**embedder.metadata, **facts}

    def stream(self, items):
        yield from ((one, vector, None) for one, vector in items)


@pytest.fixture
def archive(embedder, tmp_path):
    """Makes an Archive of vectors."""

    def make(vectors, shard_rows=7):
        from vitfast.embedding import shards

        facts = {"dim": vectors.shape[1], "dtype": str(vectors.dtype)}
        items = {f"v{i}": vector for i, vector in enumerate(vectors)}
        shards.write(Given(embedder, **facts), items, tmp_path, shard_rows, (0, 1), None)
        return Archive(tmp_path)

    return make


def expected(vectors, query, top):
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines, kind="stable")[:top]
    return [f"v{i}" for i in order], cosines[order]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_nearest_by_cosine(archive, monkeypatch, dtype, chunk):
    monkeypatch.setattr(search, "CHUNK", chunk)
    random = np.random.default_rng(0)
    # Of many lengths: by inner product the longest would win.
    lengths = random.uniform(0.1, 10, (50, 1))
    vectors = (random.standard_normal((50, 12)) * lengths).astype(dtype)
    found = archive(vectors)
    queries = random.standard_normal((4, 12)) * 3
    for query, hits in zip(queries, found.search(queries, 6), strict=True):
        ids, cosines = expected(vectors, query, 6)
        assert [hit.id for hit in hits] == ids
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-5)
    assert len(found.search(queries[0], 99)[0]) == len(found) == 50
    assert (found.vectors() == vectors).all()
    assert (found.vector("v23") == vectors[23]).all()
    assert "v49" in found and "v50" not in found


def test_equals_come_in_order(archive):
    vectors = np.tile(np.eye(3, dtype=np.float32), (10, 1))
    hits = archive(vectors).search(np.array([0.0, 1.0, 0.0]), 4)[0]
    assert [hit.id for hit in hits] == ["v1", "v4", "v7", "v10"]


def test_beyond_the_limit_without_an_index(archive, monkeypatch, caplog):
    vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    found = archive(vectors)
    monkeypatch.setattr(search, "EXACT_UP_TO", 29)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        search.importlib.util, "find_spec", lambda name: None if name == "usearch" else find(name)
    )
    with caplog.at_level(logging.WARNING, logger="vitfast"):
        hits = found.search(vectors[3], 5)[0]
    assert [hit.id for hit in hits] == expected(vectors, vectors[3], 5)[0]
    assert "vitfast[search]" in caplog.text


@needs_usearch
def test_beyond_the_limit_with_an_index(archive, monkeypatch, tmp_path):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((400, 16)).astype(np.float16)
    found = archive(vectors, shard_rows=90)
    monkeypatch.setattr(search, "EXACT_UP_TO", 399)
    for _ in range(2):  # built, and read
        right = 0
        for query in random.standard_normal((20, 16)):
            hits = found.search(query, 5)[0]
            ids, cosines = expected(vectors, query, 5)
            right += len({hit.id for hit in hits} & set(ids))
            assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
        assert right >= 95
    (kept,) = tmp_path.glob("*.usearch")
    archive(np.vstack([vectors, vectors[:1]]), shard_rows=90)
    assert len(Archive(tmp_path).search(vectors[0], 3)[0]) == 3
    (new,) = tmp_path.glob("*.usearch")
    assert new != kept


def test_mistakes(archive, tmp_path):
    with pytest.raises(InputValueError, match="no such folder"):
        Archive(tmp_path / "none")
    with pytest.raises(InputValueError, match="holds no vectors"):
        Archive(tmp_path)
    found = archive(np.eye(3, dtype=np.float32))
    for query, message in (
        (np.ones(4), r"expected \[Q, 3\]"),
        (np.zeros(3), "no direction"),
        (np.full(3, np.nan), "no direction"),
    ):
        with pytest.raises(InputValueError, match=message):
            found.search(query)
    with pytest.raises(InputValueError, match="at least 1"):
        found.search(np.ones(3), 0)
    with pytest.raises(InputValueError, match="has no id 'w'"):
        found.vector("w")


def test_shards_of_two_kinds_are_not_searched(embedder, small, pictures, tmp_path):
    embedder.write({"a": pictures[0]}, tmp_path / "a")
    small(seed=1).write({"b": pictures[1]}, tmp_path / "b")
    (tmp_path / "b" / "part-00000.parquet").rename(tmp_path / "a" / "part-00001.parquet")
    with pytest.raises(InputValueError, match="part-00001.parquet is of another kind"):
        Archive(tmp_path / "a")
