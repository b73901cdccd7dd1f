"""What a worker of `vitfast prove` answers to checks and models."""

from __future__ import annotations

import pytest
import torch

from vitfast.check import prove_worker
from vitfast.errors import BackendUnavailableError
from vitfast.runtime.verdicts import FAILED, RIGHT, WRONG
from vitfast.selftest.judge import NO_MEMORY, REFUSED

CPU = torch.device("cpu")


def raising(error: Exception):
    def check() -> list[str]:
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "state", "reason"),
    [
        (list, RIGHT, ""),
        (lambda: ["one", "two", "three", "four"], WRONG, "one; two; three"),
        (raising(BackendUnavailableError("op:\n  - not today")), REFUSED, "not today"),
        (raising(torch.cuda.OutOfMemoryError("no room")), NO_MEMORY, "no room"),
        (raising(ValueError("odd\nvalue")), FAILED, "ValueError: odd"),
    ],
    ids=["right", "wrong", "refused", "memory", "crash"],
)
def test_a_check(monkeypatch, check, state, reason):
    monkeypatch.setattr(prove_worker, "checks_of", lambda *_: {"a check": check})
    found = prove_worker._check({"op": "grn", "name": "a check"}, CPU)
    assert (found["state"], found["reason"]) == (state, reason) and not found.get("broken")


def test_a_model():
    task = {"model": "test_vit", "size": (32, 32), "batch": 1, "dtype": "float32", "train": False,
            "peers": ["eager"], "seconds": 0.01, "options": {}}  # fmt: skip
    found = prove_worker._model(task, CPU)
    assert found["state"] == RIGHT and set(found["row"]["results"]) == {"eager", "vitfast"}
    assert prove_worker._model(task | {"model": "xyzzy"}, CPU)["state"] == FAILED
