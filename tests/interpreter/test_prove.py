"""`vitfast prove` with Triton's interpreter for a GPU; and killed while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import vitfast  # noqa: F401 so that this file needs what the command does


def start(tmp_path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "vitfast", "prove", "--json", str(tmp_path / "out"), *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_to_its_end(tmp_path):
    process = start(tmp_path, "--op", "layer_norm", "--seconds", "3000")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "out/prove.json").read_text())
    assert found["finished"] and found["left_out"] == []
    assert {item["stage"] for item in found["items"]} == {
        "selftest",
        "hardware",
        "kernels",
        "models",
    }
    assert {item.get("state", "right") for item in found["items"]} == {"right"}
    table = json.loads((tmp_path / "out/interpreter.json").read_text())
    assert table["verdicts"]["ops"]["layer_norm"]["float32 backward"]["state"] == "right"


def test_killed_it_leaves_what_is_done(tmp_path):
    """At whatever moment: the file is there, whole, with all items that were answered."""
    process = start(tmp_path, "--op", "layer_norm", "--op", "grn")
    path, seen = tmp_path / "out/prove.json", 0
    while process.poll() is None and seen < 3:
        time.sleep(0.05)
        if path.exists():
            seen = len(json.loads(path.read_text())["items"])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = json.loads(path.read_text())
    assert len(found["items"]) >= seen == 3 and not found["finished"]
