"""Daft and Ray Data, on their local runners, give the vectors of the direct call."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from vitfast.embedding import RayEmbedder, daft_embedder, find_images

OPTIONS = {"model_kwargs": {"img_size": 32}, "device": "cpu", "batch_size": 4}


@pytest.fixture
def expected(small, folder):
    """path -> vector or None, of the direct call."""
    (folder / "broken.png").write_bytes(b"x")
    paths = [str(path) for _, path in find_images(folder)]
    return {one.id: one.vector for one in small().stream(zip(paths, paths, strict=True))}


def same(found, expected):
    assert sorted(found) == sorted(expected) and len(found) == 11
    for path, (vector, error) in found.items():
        if expected[path] is None:
            assert vector is None and error == "no image that Pillow knows"
        else:
            assert error is None
            np.testing.assert_allclose(vector, expected[path], rtol=0, atol=1e-3)


def test_daft(expected):
    daft = pytest.importorskip("daft")
    embed = daft_embedder("test_vit", **OPTIONS)
    frame = daft.from_pydict({"path": list(expected)})
    for images in (frame["path"], frame["path"].download()):
        rows = frame.select("path", embed(images).alias("e")).to_pydict()
        found = {p: (e["vector"], e["error"]) for p, e in zip(rows["path"], rows["e"], strict=True)}
        same(found, expected)


def test_ray_data(expected):
    pytest.importorskip("ray.data")
    # Ray's processes talk through sockets, which tests may not open: it runs in its own.
    program = """
import json, sys, ray
from vitfast.embedding import RayEmbedder
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
files = ray.data.read_binary_files(json.loads(sys.argv[1]), include_paths=True)
found = files.map_batches(
    RayEmbedder, fn_constructor_args=("test_vit",), fn_constructor_kwargs=json.loads(sys.argv[2]),
    batch_format="pyarrow", batch_size=8, compute=ray.data.ActorPoolStrategy(size=1),
)
rows = found.take_all()
print(json.dumps({row["path"]: (None if row["vector"] is None else list(map(float, row["vector"])),
                                row["error"]) for row in rows}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(expected)), json.dumps(OPTIONS)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        k.removeprefix("file://"): v for k, v in json.loads(done.stdout.splitlines()[-1]).items()
    }
    same(found, expected)


def test_the_class_that_ray_calls(expected):
    """What `map_batches` does with it, where Ray is not installed."""
    table = pa.table({"where": list(expected), "n": list(range(11))})
    found = RayEmbedder("test_vit", column="where", **OPTIONS)(table)
    assert found.column_names == ["n", "vector", "error"]
    rows = zip(expected, found["vector"].to_pylist(), found["error"].to_pylist(), strict=True)
    same({path: (vector, error) for path, vector, error in rows}, expected)
