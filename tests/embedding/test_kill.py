"""Killed at any point and started again: every id exactly once, and whole shards at all times."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# One process imports torch; the runs that are killed are forks of it, each a few milliseconds. No
# thread pool of torch's exists there before they fork.
PROGRAM = """
import json, os, random, signal, sys, time
import numpy as np
import pyarrow.parquet as pq
import torch

torch.set_num_threads(1)
from vitfast.embedding import Archive, Embedder, shards
from vitfast.runtime import files

embedder = Embedder("test_vit", model_kwargs={"img_size": 32}, device="cpu", batch_size=4,
                    workers=2)
random_ = np.random.default_rng(0)
ITEMS = {f"{i:02d}": random_.integers(0, 256, (32, 32, 3), np.uint8) for i in range(40)}
ITEMS["07"] = b"broken"
embedder.dim
sync, link, write_table = files.sync, os.link, pq.write_table

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies_at(point, count):
    "Kill this process when it comes to the point for the count-th time."
    left = [count]
    def come(name):
        if name == point:
            left[0] -= 1
            if not left[0]:
                die()
    def half_a_table(table, path, **options):
        write_table(table, path, **options)
        if point == "a half written file" and left[0] == 1:
            os.truncate(path, os.path.getsize(path) // 2)
        come("a half written file")
    def synced(path):
        come("before its bytes are on the disk")
        sync(path)
    def linked(source, target):
        come("before it has its name")
        link(source, target)
        come("when it has its name")
    shards.sync = files.sync = synced
    os.link, pq.write_table = linked, half_a_table
    return lambda good, bad, there: come("an image")

def run(point, count, place=None):
    pid = os.fork()
    if pid == 0:
        progress = dies_at(point, count)
        embedder.write(ITEMS, sys.argv[1], shard_rows=6, progress=progress, place=place)
        os._exit(0)
    return pid

def end(pid):
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    ids = Archive(sys.argv[1]).ids if any(
        name.startswith("part-") for name in os.listdir(sys.argv[1])) else []
    seen.append([len(ids), len(set(ids)), status])

seen = []
for point, count in (
    ("an image", 3), ("a half written file", 1), ("before its bytes are on the disk", 1),
    ("before it has its name", 1), ("an image", 7), ("when it has its name", 1),
    ("a half written file", 2), ("when it has its name", 1), ("an image", 5),
):
    end(run(point, count))
for milliseconds in (4, 9, 17):  # from outside, wherever it is
    pid = run("", 0)
    time.sleep(milliseconds / 1000)
    os.kill(pid, signal.SIGKILL)
    end(pid)
for rank in (0, 1):
    end(run("an image", 5, (rank, 2)))
end(run("", 0))
assert not {"daft", "ray"} & set(sys.modules)  # which only their adapters import
print(json.dumps(seen))
"""


def test_every_id_once(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    counts = [ids for ids, _, _ in seen]
    assert all(ids == distinct for ids, distinct, _ in seen)
    assert counts == sorted(counts) and counts[-1] == 39
    assert sum(status == 9 for _, _, status in seen) >= 8
    assert seen[-1][2] == 0
    assert [json.loads(line)["id"] for line in (out / "errors.jsonl").open()] == ["07"]
    left = [name for name in os.listdir(out) if not name.startswith("part-")]
    assert left == ["errors.jsonl"]
