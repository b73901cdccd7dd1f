"""Folders of shards: what is in them, going on where a run ended, and what does not fit."""

from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitfast
from vitfast.embedding import Archive, find_images, shards
from vitfast.errors import BackendUnavailableError, InputTypeError, InputValueError


def names(folder):
    return sorted(os.listdir(folder))


def items_of(pictures):
    return {f"p{i}": picture for i, picture in enumerate(pictures)}


@pytest.mark.parametrize("dtype, number", [("float16", pa.float16()), ("float32", pa.float32())])
def test_what_a_shard_holds(small, pictures, tmp_path, dtype, number):
    embedder = small(dtype=dtype)
    done = embedder.write(items_of(pictures), tmp_path / "a" / "out", shard_rows=4)
    assert (done.embedded, done.present, done.errors) == (10, 0, {})
    out = tmp_path / "a" / "out"
    assert names(out) == [f"part-0000{i}.parquet" for i in range(3)]
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.iterdir()))
    assert table.schema.field("id").type == pa.string()
    kind = table.schema.field("vector").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.value_type, kind.list_size) == (number, embedder.dim)
    assert table["id"].to_pylist() == list(items_of(pictures))
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, embedder.embed(pictures), rtol=0, atol=2e-3)
    facts = json.loads(pq.read_schema(out / "part-00002.parquet").metadata[b"vitfast"])
    assert facts == json.loads(json.dumps(embedder.metadata))
    assert facts["model"] == "test_vit" and facts["dtype"] == dtype and facts["normalized"] is True
    assert len(facts["weights_sha256"]) == 64 and facts["dim"] == embedder.dim
    assert facts["preprocessing"]["input_size"] == [3, 32, 32]
    assert facts["versions"]["vitfast"] == vitfast.__version__ and "commit" in facts["versions"]


def test_three_broken_of_three_hundred(small, tmp_path):
    random = np.random.default_rng(0)
    items = {}
    for i in range(300):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        items[f"{i:03d}"] = file.getvalue()
    items["017"], items["150"], items["299"] = b"", b"no image", items["299"][:60]
    done = small(batch_size=32).write(items, tmp_path, shard_rows=100)
    assert done.embedded == 297
    assert sorted(done.errors) == ["017", "150", "299"]
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [(line["id"], line["error"]) for line in lines] == list(done.errors.items())
    assert Archive(tmp_path).ids == [one for one in items if one not in done.errors]


def test_a_second_run_adds_what_is_new_and_tries_the_broken_again(small, pictures, tmp_path):
    items = items_of(pictures)
    first = {**dict(list(items.items())[2:6]), "p9": b"broken"}
    small().write(first, tmp_path)
    before = (tmp_path / "part-00000.parquet").read_bytes()
    assert names(tmp_path) == ["errors.jsonl", "part-00000.parquet"]
    calls = []
    done = small().write(items, tmp_path, progress=lambda *counts: calls.append(counts))
    assert (done.embedded, done.present, done.errors) == (6, 4, {})
    assert calls[-1] == (6, 0, 4)
    assert names(tmp_path) == ["part-00000.parquet", "part-00001.parquet"]
    assert (tmp_path / "part-00000.parquet").read_bytes() == before
    archive = Archive(tmp_path)
    assert sorted(archive.ids) == sorted(items) and len(archive) == len(set(archive.ids))
    for one, vector in zip(archive.ids, archive.vectors(), strict=True):
        np.testing.assert_allclose(vector, small().embed([items[one]])[0], rtol=0, atol=2e-3)
    assert small().write(items, tmp_path).present == 10
    assert names(tmp_path) == ["part-00000.parquet", "part-00001.parquet"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, "weights_sha256 is '[0-9a-f]{12}' there and"),
        ({"dtype": "float32"}, "dtype is 'float16' there and 'float32' here"),
        ({"normalize": False}, "normalized"),
        ({"pool": "avg"}, "pool"),
        ({"model_kwargs": {"img_size": 64}}, "model_kwargs"),
        ({"transform": lambda image: None}, "preprocessing"),
    ],
)
def test_vectors_of_another_kind_are_not_mixed(small, pictures, tmp_path, options, message):
    small().write({"a": pictures[0]}, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    embedder = small(**options)
    embedder.dim = small().dim  # of a transform that makes nothing
    with pytest.raises(InputValueError, match=f"holds vectors of another kind: {message}"):
        embedder.write({"b": pictures[1]}, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_what_may_differ(small, pictures, tmp_path):
    small().write({"a": pictures[0]}, tmp_path)
    other = small(swap=False, batch_size=2, workers=1)
    assert other.write({"b": pictures[1]}, tmp_path).embedded == 1


def test_ids_are_unique_strings(embedder, pictures, tmp_path):
    for items, kind, message in (
        ([("a", pictures[0]), ("b", pictures[1]), ("a", pictures[2])], InputValueError, "'a' is"),
        ([(3, pictures[0])], InputTypeError, "strings"),
        ([("", pictures[0])], InputValueError, "empty"),
    ):
        with pytest.raises(kind, match=message):
            embedder.write(items, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(kind, match=message):
            embedder.write(iter(items), tmp_path / "stream")
        assert names(tmp_path / "stream") == []


def test_a_stream_is_not_gathered(embedder, pictures, tmp_path):
    taken = []

    def many():
        for i in range(40):
            taken.append(i)
            yield f"{i}", pictures[i % 10]

    seen = []
    embedder.write(many(), tmp_path, progress=lambda good, bad, there: seen.append(len(taken)))
    assert seen[0] < 25 and len(seen) == 40


def test_ranks_share_a_folder(small, pictures, tmp_path):
    items = {**items_of(pictures), "x": b"", "y": b""}
    embedder = small()
    for rank in (1, 0):
        done = embedder.write(items, tmp_path, shard_rows=2, place=(rank, 3))
        assert (done.embedded, len(done.errors)) == ((4, 0) if rank == 0 else (3, 1))
    assert "part-r000-00000.parquet" in names(tmp_path)
    assert "errors-r001-of-003.jsonl" in names(tmp_path)
    assert sorted(Archive(tmp_path).ids) == sorted(f"p{i}" for i in range(10) if i % 3 != 2)
    # The third never ran; another number of ranks goes on, and lists what is broken anew.
    for rank in (0, 1):
        embedder.write(items, tmp_path, place=(rank, 2))
    found = Archive(tmp_path).ids
    assert sorted(found) == sorted(items_of(pictures))
    assert [n for n in names(tmp_path) if n.startswith("err")] == [
        "errors-r000-of-002.jsonl",
        "errors-r001-of-002.jsonl",
    ]
    mended = {**items, "y": pictures[1]}
    embedder.write(mended, tmp_path, place=(1, 2))
    assert [n for n in names(tmp_path) if n.startswith("err")] == ["errors-r000-of-002.jsonl"]
    assert embedder.write(items, tmp_path).present == 11
    assert [n for n in names(tmp_path) if n.startswith("err")] == ["errors.jsonl"]


def test_torchrun_says_the_rank(embedder, pictures, tmp_path, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert embedder.write(items_of(pictures), tmp_path).embedded == 5
    assert Archive(tmp_path).ids == [f"p{i}" for i in range(1, 10, 2)]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputValueError, match="torchrun sets no such"):
        embedder.write(items_of(pictures), tmp_path)
    with pytest.raises(InputValueError, match="rank 2 of 2"):
        embedder.write(items_of(pictures), tmp_path, place=(2, 2))


def test_two_at_once(embedder, pictures, tmp_path):
    """Alone, a process holds the folder; as one rank twice, one of them finds its number taken."""
    errors = []

    def second(place, one):
        def progress(good, bad, there):
            if good == 1:
                try:
                    embedder.write({one: pictures[3]}, tmp_path, place=place)
                except InputValueError as error:
                    errors.append(str(error))

        return progress

    embedder.write(items_of(pictures[:2]), tmp_path, progress=second(None, "p3"))
    assert len(errors) == 1 and "another process is writing there" in errors[0]
    with pytest.raises(InputValueError, match="there already: another process"):
        embedder.write({"p4": pictures[4]}, tmp_path, place=(0, 2), progress=second((0, 2), "p4"))
    assert Archive(tmp_path).ids == ["p0", "p1", "p4"]


def test_an_interrupt_keeps_what_was_computed(embedder, pictures, tmp_path):
    def stop(good, bad, there):
        if good == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedder.write(items_of(pictures), tmp_path, progress=stop)
    assert Archive(tmp_path).ids == [f"p{i}" for i in range(6)]
    assert embedder.write(items_of(pictures), tmp_path).present == 6


def test_a_full_disk_leaves_whole_shards(embedder, pictures, tmp_path, monkeypatch):
    sync, calls = shards.sync, []

    def full(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(shards, "sync", full)
    with pytest.raises(OSError, match="No space"):
        embedder.write(items_of(pictures), tmp_path, shard_rows=4)
    assert names(tmp_path) == ["part-00000.parquet"]
    assert embedder.write(items_of(pictures), tmp_path).present == 4


def test_a_file_system_without_links(embedder, pictures, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    embedder.write(items_of(pictures), tmp_path, shard_rows=4)
    assert names(tmp_path) == [f"part-0000{i}.parquet" for i in range(3)]


def test_folders_that_do_not_do(embedder, pictures, tmp_path):
    def refused(message, folder=tmp_path):
        with pytest.raises(InputValueError, match=message):
            embedder.write(items_of(pictures), folder)

    (tmp_path / "file").touch()
    refused("cannot be a folder", tmp_path / "file")
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1")
    refused("part-00000.parquet is no shard")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "part-00000.parquet")
    refused("was not written by vitfast")
    os.remove(tmp_path / "part-00000.parquet")
    embedder.write({"p3": pictures[3]}, tmp_path)
    (tmp_path / "part-00007.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    refused("holds an id twice")


def test_without_pyarrow(embedder, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for call in (
        lambda: embedder.write(items_of(pictures), tmp_path / "out"),
        lambda: Archive(tmp_path),
    ):
        with pytest.raises(BackendUnavailableError, match=r"vitfast\[embed\]"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_files(embedder, folder, pictures, tmp_path):
    embedder.write(find_images(folder), tmp_path / "out")
    archive = Archive(tmp_path / "out")
    assert archive.ids == [f"{i}.png" for i in range(5)] + [f"below/{i}.png" for i in range(5, 10)]
    np.testing.assert_allclose(archive.vectors(), embedder.embed(pictures), rtol=0, atol=2e-3)
