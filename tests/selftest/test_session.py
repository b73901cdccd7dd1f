"""A session of tests: what is asked, what becomes of the answers, who tests and who waits.

The workers are stand-ins: `FAKE` answers by the op's name. The real ones run in
tests/interpreter/test_selftest.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast.runtime import launches, trust, verdicts
from vitfast.runtime.verdicts import FAILED, PASSES, RIGHT, SLOW, WRONG, Question, Verdict
from vitfast.selftest import session, workers
from vitfast.selftest.problems import Described, Problem, samples
from vitfast.settings import settings

CPU = torch.device("cpu")
FAKE = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    op, sample = task["problem"]["op"], task["problem"]["sample"]
    with open(LOG, "a") as log:
        log.write(f"{op} {task['passes']} {sample} {os.getpid()}\\n")
    if op == "grn":
        os._exit(1)
    if op == "attention":
        time.sleep(1000)
    state, broken = "right", False
    if op == "rms_norm" and task["passes"] == "backward":
        state = "wrong"
    if op == "patch_merge":
        state, broken = "failed", True
    if op == "dwconv_norm":
        state = "no memory"
    if op == "linear_act" and sample != "prime_sizes":
        state = "refused"
    if op == "patch_embed":
        state = "refused"
    print(json.dumps({"state": state, "reason": f"{op}!", "broken": broken}), flush=True)
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache of its own; stand-ins for workers; the CPU as the device that is tested."""
    log = tmp_path / "log"
    log.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = FAKE.replace("LOG", repr(str(log)))
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", fake))
    monkeypatch.setattr(session, "is_testable", lambda device: True)
    monkeypatch.setattr(session, "TASK_SECONDS", 20.0)
    trust.forget()
    launches.reread_tables()
    yield
    trust.forget()
    launches.reread_tables()


def asked(tmp_path) -> list[str]:
    """The tasks that the workers were given: op, pass and sample."""
    return [" ".join(line.split(" ")[:3]) for line in (tmp_path / "log").read_text().splitlines()]


def wanted(*ops: str, passes=PASSES, problems=()) -> dict[Question, list[Problem]]:
    return {Question(op, "float32", p): list(problems) for op in ops for p in passes}


def states(report: session.TrustReport) -> dict[str, str]:
    return {f"{e.question.op} {e.question.passes}": e.state for e in report.tested}


def test_cold_then_cached(tmp_path):
    report = session.decide(CPU, wanted("layer_norm"), None)
    assert states(report) == {"layer_norm forward": RIGHT, "layer_norm backward": RIGHT}
    assert report and all(entry.now for entry in report.tested)
    count = len(samples(vitfast.ops.spec_of("layer_norm"), "float32", 5e4))
    assert len(asked(tmp_path)) == 2 * count > 0
    assert trust.doubt("layer_norm", CPU, torch.float32, train=True) == ""
    again = session.decide(CPU, wanted("layer_norm"), None)
    assert again and not any(entry.now for entry in again.tested)
    assert len(asked(tmp_path)) == 2 * count
    trust.forget()  # as in another process
    assert trust.doubt("layer_norm", CPU, torch.float32, train=True) == ""
    assert "2 of 2 kinds of kernels are used" in str(report)


def test_each_answer_has_its_verdict(monkeypatch):
    monkeypatch.setattr(session, "TASK_SECONDS", 1.0)
    ops = ("layer_norm", "rms_norm", "grn", "patch_merge", "dwconv_norm", "linear_act",
           "patch_embed")  # fmt: skip
    report = session.decide(CPU, wanted(*ops), None)
    found = states(report)
    assert found["layer_norm forward"] == found["layer_norm backward"] == RIGHT
    assert found["rms_norm forward"] == RIGHT and found["rms_norm backward"] == WRONG
    assert found["grn forward"] == found["patch_merge backward"] == FAILED
    assert found["dwconv_norm forward"] == "not tested"  # nor known to be wrong
    assert found["linear_act forward"] == RIGHT  # what is refused is none of its cases
    assert found["patch_embed forward"] == FAILED  # it refuses all
    assert not report
    reasons = {e.question.op: e.reason for e in report.tested if e.state not in (RIGHT, "x")}
    assert "ended with code 1" in reasons["grn"] and "patch_merge!" in reasons["patch_merge"]
    assert "refuses all problems" in reasons["patch_embed"]
    assert trust.doubt("rms_norm", CPU, torch.float32, train=False) == ""
    assert "wrong in a test" in trust.doubt("rms_norm", CPU, torch.float32, train=True)
    kept = verdicts.known(CPU)
    assert Question("dwconv_norm", "float32", "forward") not in kept
    assert kept[Question("grn", "float32", "forward")].state == FAILED


def test_a_kernel_that_hangs_fails(monkeypatch):
    monkeypatch.setattr(session, "TASK_SECONDS", 0.5)
    monkeypatch.setattr(session, "samples", lambda *_: [Problem("attention", "float32", {})])
    report = session.decide(CPU, wanted("attention", passes=("forward",)), None)
    assert states(report) == {"attention forward": FAILED}
    assert "no answer within" in report.tested[0].reason


@pytest.mark.parametrize("command", [("/nowhere/python",), (sys.executable, "-c", "exit(3)")])
def test_without_workers_nothing_is_known(monkeypatch, caplog, command):
    """It says nothing about the kernels, which are tested when there are workers."""
    with monkeypatch.context() as patch:
        patch.setattr(workers, "COMMAND", command)
        report = session.decide(CPU, wanted("layer_norm"), None)
    assert set(states(report).values()) == {"not tested"} and verdicts.known(CPU) == {}
    assert caplog.text.count("could not be tested") == 1
    assert session.decide(CPU, wanted("layer_norm"), None)


def test_what_failed_once_is_not_tried_again(tmp_path):
    for _ in range(2):
        session.decide(CPU, wanted("rms_norm"), None)
    tried = [line for line in asked(tmp_path) if "backward" in line]
    assert len(tried) == len(set(tried)) > 0
    assert len(asked(tmp_path)) == len(set(asked(tmp_path)))


def test_what_found_no_memory_is_tried_again(tmp_path):
    for _ in range(2):
        session.decide(CPU, wanted("dwconv_norm"), None)
    assert len(asked(tmp_path)) == 2 * len(set(asked(tmp_path)))


def test_another_model_s_problems_are_added(tmp_path):
    """What was tested is not tested again; a model's own problems are, at sensible sizes."""
    session.decide(CPU, wanted("layer_norm"), None)
    before = len(asked(tmp_path))
    own = Problem("layer_norm", "float32", {"x": Described((4, 8), (8, 1), "float32")})
    huge = Problem("layer_norm", "float32", {"x": Described((2**20, 768), (768, 1), "float32")})
    for _ in range(2):
        assert session.decide(CPU, wanted("layer_norm", problems=[own, huge]), None)
    assert len(asked(tmp_path)) == before + 2
    kept = verdicts.known(CPU)[Question("layer_norm", "float32", "forward")]
    assert own.name in kept.problems and huge.name not in kept.problems


@pytest.mark.parametrize("setting", ["never", "cached"])
def test_a_user_who_wants_no_tests(monkeypatch, tmp_path, setting):
    monkeypatch.setattr(settings, "trust", setting)
    report = session.decide(CPU, wanted("layer_norm"), None)
    assert asked(tmp_path) == [] and (report.note or states(report)["layer_norm forward"])
    assert trust.doubt("layer_norm", CPU, torch.float32, train=False) != ""
    trust.forget()
    verdicts.keep(CPU, {Question("layer_norm", "float32", p): Verdict(RIGHT) for p in PASSES})
    session.decide(CPU, wanted("layer_norm"), None)
    doubt = trust.doubt("layer_norm", CPU, torch.float32, train=True)
    assert doubt == ("" if setting == "cached" else "settings.trust is 'never'")
    assert asked(tmp_path) == []


@pytest.mark.parametrize("what", ["traced", "captured"])
def test_nothing_is_tested_while_a_graph_is_made(monkeypatch, tmp_path, what):
    if what == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        note = session.decide(CPU, wanted("layer_norm"), None).note
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        note = session.decide(torch.device("cuda", 0), wanted("layer_norm"), None).note
    assert ("tracing" if what == "traced" else "captured") in note
    assert asked(tmp_path) == [] and not trust._DECISIONS


def test_edited_kernels_are_tested_again(monkeypatch, tmp_path):
    session.decide(CPU, wanted("layer_norm"), None)
    before = len(asked(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "kernels_of", lambda op: "edited")
        session.decide(CPU, wanted("layer_norm"), None)
    assert len(asked(tmp_path)) == 2 * before


def test_a_folder_that_cannot_be_written_costs_no_test(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert session.decide(CPU, wanted("layer_norm"), None)
    assert trust.doubt("layer_norm", CPU, torch.float32, train=True) == ""


def test_of_two_processes_one_tests(tmp_path):
    """The other waits for its verdicts."""
    code = f"""
import sys, torch
from vitfast.runtime.verdicts import Question
from vitfast.selftest import session, workers
workers.COMMAND = {workers.COMMAND!r}
session.is_testable = lambda device: True
wanted = {{Question("layer_norm", "float32", "forward"): []}}
report = session.decide(torch.device("cpu"), wanted, None)
assert report, report
print(report.tested[0].now)
"""
    root = str(Path(vitfast.__file__).parents[1])
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0].strip() for process in running]
    assert sorted(said) == ["False", "True"]
    assert len(asked(tmp_path)) == len(set(asked(tmp_path)))


def test_slow_kernels_are_not_worth_it():
    """Where a table chooses by size they stay; else the sum over a model's problems decides."""
    right = Verdict(RIGHT, problems=("a",))

    def reply(ours: float, others: float, asked: list | None = None) -> dict:
        seconds = {"triton": ours, "reference": others, "vendor": others + 1}
        return {"seconds": seconds, "asked": asked or []}

    fast = session.judged_by_time(right, [reply(1.0, 3.0), reply(2.0, 1.0)])
    assert fast == Verdict(RIGHT, "", ("a",), 4 / 3)
    slow = session.judged_by_time(right, [reply(1.0, 0.5), reply(1.0, 1.2)])
    assert slow.state == SLOW and slow.speed == 0.85 and slow.problems == ("a",)
    assert (
        session.judged_by_time(right, [reply(1.0, 0.99)]).state == RIGHT
    )  # as fast, but for noise
    chosen = session.judged_by_time(right, [reply(1.0, 0.5, [["linear_act.backend", {}]])])
    assert chosen.state == RIGHT and chosen.speed == 0.5


def test_times_decide_on_a_gpu(monkeypatch):
    """With stand-ins for the workers that time: the table gets the fastest by size."""
    replies = {
        "layer_norm": {"seconds": {"triton": 1.0, "reference": 0.5}, "asked": []},
        "linear_act": {
            "seconds": {"triton": 2.0, "vendor": 1.0},
            "asked": [["linear_act.backend", {"m": 5, "n": 8}]],
        },
        "grn": {"seconds": {}, "asked": [], "reason": "RuntimeError", "broken": True},
    }

    def answers(tasks, count, seconds, **_):
        assert count == 1 and all(task["do"] == "time" for task in tasks)
        yield from ((i, replies[task["problem"]["op"]]) for i, task in enumerate(tasks))

    monkeypatch.setattr(workers, "answers", answers)
    own = Described((4, 8), (8, 1), "float32")
    questions = {Question(op, "float32", "forward"): Verdict(RIGHT) for op in replies}
    todo = {q: [Problem(q.op, "float32", {"x": own})] for q in questions}
    found = {q.op: v.state for q, v in session._timed(CPU, questions, todo).items()}
    assert found == {"layer_norm": SLOW, "linear_act": RIGHT, "grn": RIGHT}
    arch = launches.arch_of(CPU)
    assert launches.choice_of("linear_act.backend", arch, {"m": 5, "n": 8}) == "vendor"


def test_a_line_of_progress(capsys):
    session.decide(CPU, wanted("layer_norm", passes=("forward",)), True)
    said = capsys.readouterr().err
    assert "testing kernels on Triton's interpreter, once on this machine: 2 of 2" in said
    session.decide(CPU, wanted("rms_norm", passes=("forward",)), None)
    assert capsys.readouterr().err == ""  # it is no terminal


def test_a_report_as_text():
    entry = session.TrustEntry(Question("grn", "float32", "forward"), WRONG, "a: out0 is off", 2.0)
    text = str(session.TrustReport("a GPU", [entry]))
    assert text.splitlines()[0] == "vitfast: 0 of 1 kinds of kernels are used on a GPU"
    assert "grn float32 forward" in text and "2.00x" in text and "out0 is off" in text
    assert json.dumps(verdicts.as_document(CPU, {entry.question: Verdict(WRONG, "a")}))
