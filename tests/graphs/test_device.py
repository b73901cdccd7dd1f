"""The calls of torch.cuda that capture a graph, on a torch.cuda that only writes them down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from vitfast.graphs import device

HERE = torch.device("cuda", 0)


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Graph:
    log: list[str]

    def reset(self):
        self.log.append("reset")
        raise RuntimeError("of a graph that was never captured")


class Tensor:
    def __init__(self, log):
        self.log = log

    def record_stream(self, stream):
        self.log.append(f"kept for {stream.name}")


class Cuda(NamedTuple):
    lines: list[str]
    switch: Callable[[str], None]


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda, replaced; what was called, and a function that makes a stream current."""
    log: list[str] = []
    current = [Stream(log, "main")]

    @contextlib.contextmanager
    def stream(side):
        current.append(side)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(captured, pool, stream, capture_error_mode):
        log.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        with torch.cuda.stream(stream):
            yield

    pools = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("G", (Graph,), {"log": log}))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(pools)}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext())
    return Cuda(log, lambda name: current.append(Stream(log, name)))


def test_warm_up_runs_on_the_side_stream_between_what_is_before_and_after(cuda):
    recorder = device.recorder_for(HERE)
    recorder.warm_up(lambda: cuda.lines.append(torch.cuda.current_stream(HERE).name), 2)
    assert cuda.lines == ["side waits for main", "side", "side", "main waits for side"]


def test_graphs_share_a_pool_for_as_long_as_one_lives(cuda):
    recorder = device.recorder_for(HERE)
    first, result = recorder.capture(lambda: "result")
    second, _ = recorder.capture(lambda: None)
    del first, second
    recorder.capture(lambda: None)
    assert result == "result"
    assert cuda.lines == [f"capture in pool {i} on side, thread_local" for i in (0, 0, 1)]


def test_a_failed_capture_is_cleaned_up_and_its_pool_not_used_again(cuda):
    recorder = device.recorder_for(HERE)

    def fail():
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        recorder.capture(fail)
    recorder.capture(lambda: None)
    assert [line[:17] for line in cuda.lines] == ["capture in pool 0", "reset", "capture in pool 1"]


def test_another_stream_waits_and_inputs_are_kept_for_it(cuda):
    recorder, inputs = device.recorder_for(HERE), [Tensor(cuda.lines)]
    for name in (None, None, "other", None):
        if name:
            cuda.switch(name)
        recorder.follow(inputs)
    assert cuda.lines == ["other waits for main", "kept for other"]


def test_only_gpus_have_graphs():
    assert device.recorder_for(torch.device("cpu")) is None
    assert device.recorder_for(torch.device("meta")) is None
