"""Workers that crash, hang, spoil their device or talk nonsense: each task gets its answer."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from vitfast.selftest import workers

FAKE = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    do = task["do"]
    if do == "crash":
        print("a last word", file=sys.stderr, flush=True)
        os._exit(11)
    if do == "hang":
        time.sleep(1000)
    if do == "nonsense":
        print("Segmentation?", flush=True)
        continue
    if do == "list":
        print("[1]", flush=True)
        continue
    print(json.dumps({"state": do, "pid": os.getpid(), "broken": do == "break",
                      "variable": os.environ.get("A_VARIABLE")}), flush=True)
"""


def run(*does: str, count: int = 1, seconds: float = 60.0, command=None) -> list[dict]:
    """The answers to these tasks, in their order."""
    tasks = [{"do": do} for do in does]
    command = command or (sys.executable, "-c", FAKE)
    found = dict(
        workers.answers(tasks, count, seconds, command=command, environment={"A_VARIABLE": "7"})
    )
    assert sorted(found) == list(range(len(tasks)))
    return [found[i] for i in range(len(tasks))]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_task_is_answered(count):
    found = run("a", "b", "c", count=count)
    assert [reply["state"] for reply in found] == ["a", "b", "c"]
    assert {reply["variable"] for reply in found} == {"7"}
    assert len({reply["pid"] for reply in found}) <= count


def test_no_tasks_need_no_worker():
    assert run(command=("/nowhere",)) == []


def test_a_crash_costs_one_task():
    before, crashed, after = run("a", "crash", "b")
    assert before["state"] == "a" and after["state"] == "b"
    assert crashed["state"] == "failed" and crashed["broken"]
    assert "ended with code 11" in crashed["reason"] and "a last word" in crashed["reason"]
    assert before["pid"] != after["pid"]


def test_a_task_that_hangs_is_ended():
    hung, after = run("hang", "b", seconds=1.0)
    assert hung["state"] == "failed" and "no answer within 1 s" in hung["reason"]
    assert after["state"] == "b"


@pytest.mark.parametrize("what", ["nonsense", "list"])
def test_what_is_no_answer(what):
    found, after = run(what, "b")
    assert found["state"] == "failed" and "not an answer" in found["reason"]
    assert after["state"] == "b"


def test_a_spoilt_device_gets_no_further_task():
    """A worker says that it is broken; another process takes the next task."""
    before, broken, after = run("a", "break", "b")
    assert broken["broken"] and broken["state"] == "break"
    assert before["pid"] == broken["pid"] != after["pid"]


@pytest.mark.parametrize(
    "command", [("/nowhere/python",), (sys.executable, "-c", "raise SystemExit(3)")]
)
def test_where_no_worker_starts_no_task_waits_for_one(command):
    begin = time.monotonic()
    found = run(*"abcdefghijklmnopqrstuvwxyz" * 4, command=command)
    assert {reply["state"] for reply in found} == {"failed"}
    assert time.monotonic() - begin < 60  # not a timing: a hundred starts would take minutes


def test_who_stops_listening_leaves_no_process_behind():
    tasks = [{"do": "a"}, {"do": "hang"}, {"do": "hang"}]
    iterator = workers.answers(tasks, 3, 1000.0, command=(sys.executable, "-c", FAKE))
    _, reply = next(iterator)
    assert reply["state"] == "a"
    threads = threading.active_count()
    iterator.close()
    assert threading.active_count() < threads


def test_the_real_worker_answers(tmp_path):
    """From any folder, of this very package, whatever lies there by its name."""
    (tmp_path / "vitfast.py").write_text("raise ImportError('not this one')")
    task = {
        "do": "judge", "passes": "forward", "device": "cpu",
        "problem": {"op": "layer_norm", "dtype": "float32", "arguments": {}, "autocast": "",
                    "sample": "prime_width"},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        ((_, reply),) = workers.answers([task], 1, 100.0)
    assert reply["state"] == "refused" and not reply["broken"], reply
    assert "not on a GPU" in reply["reason"]
