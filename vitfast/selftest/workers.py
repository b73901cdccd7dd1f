"""Tasks for processes that may crash, hang or spoil their GPU: each is ended, the others go on.

A worker is a command that reads tasks from its standard input, a line of JSON each, and answers
with a line each; its first line says that it is ready, and "broken" in an answer that it can do no
more. One that dies, is broken or takes too long is replaced, and its task has failed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.settings import environment_with


def command_of(module: str) -> tuple[str, ...]:
    """As `python -m <module>`: it finds this package, and all else where this process does."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        f"import {module} as m; sys.exit(m.main())"
    )
    path = [str(Path(__file__).parents[2]), *sys.path]
    return (sys.executable, "-c", code, json.dumps(path))


COMMAND = command_of("vitfast.selftest.worker")
START_SECONDS = 120.0
"""A worker that is not ready by then has failed: it has to load torch, from a slow disk maybe."""

LEFT_OUT = "left out"
"""State of the answer to a task for which there was no time."""

Task = Mapping[str, Any]
Reply = dict[str, Any]


class Worker:
    """One process, and what it said."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment_with(environment or {}),
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: collections.deque[str] = collections.deque(maxlen=50)
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None  # it is a pipe
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _listen(self) -> None:
        assert self._process.stderr is not None  # it is a pipe
        self._said.extend(self._process.stderr)

    def reply(self, seconds: float) -> Reply:
        """The next line that it answers.

        Raises:
            WorkerError: it died, took too long, or said something else.
        """
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise WorkerError(f"no answer within {seconds:.0f} s") from None
        if line is None:
            code = self._process.wait()
            self._readers[1].join(5)
            last = next((text.strip() for text in reversed(self._said) if text.strip()), "")
            raise WorkerError(f"the process ended with code {code}; its last words: {last[:200]}")
        try:
            found = json.loads(line)
        except ValueError:
            raise WorkerError(f"not an answer: {line[:200]!r}") from None
        if not isinstance(found, dict):
            raise WorkerError(f"not an answer: {line[:200]!r}")
        return found

    def ask(self, task: Task, seconds: float) -> Reply:
        """Its answer to a task.

        Raises:
            WorkerError: as `reply`.
        """
        assert self._process.stdin is not None  # it is a pipe
        with contextlib.suppress(OSError):  # it has ended; its last words come with the reply
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        return self.reply(seconds)

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None  # they are pipes
            with contextlib.suppress(OSError):  # of what a process that is gone did not read
                pipe.close()


class WorkerError(Exception):
    """A worker gave no answer; the message says why."""


def answers(
    tasks: Sequence[Task],
    count: int,
    seconds: float,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    until: float = math.inf,
) -> Iterator[tuple[int, Reply]]:
    """Each task's number and its answer, as they come in.

    A task that gets none has the answer {"state": "failed", "reason": why, "broken": True, "asked":
    whether a worker had it}. Where no worker starts at all, all tasks have that. Closing the
    iterator ends the workers.

    Args:
        count: workers at a time.
        seconds: the longest that a task may take.
        command: that of a worker; `COMMAND` by default.
        environment: variables that it has besides those of this process.
        until: the end, by `time.monotonic`; tasks in progress then are ended, and they and those
            not begun have the answer {"state": LEFT_OUT}.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
    for number in range(len(tasks)):
        todo.put(number)
    stopped, begun = threading.Event(), threading.Event()
    failures: list[str] = []
    alive: list[Worker] = []
    lock = threading.Lock()

    def start() -> Worker:
        with lock:
            if stopped.is_set():
                raise WorkerError("stopped")
            if len(failures) > count and not begun.is_set():
                raise WorkerError(failures[-1])  # and none will
            worker = Worker(command or COMMAND, environment)
            alive.append(worker)
        try:
            worker.reply(max(0.0, min(START_SECONDS, until - time.monotonic())))
        except WorkerError as error:
            failures.append(str(error))
            drop(worker)
            raise
        begun.set()
        return worker

    def drop(worker: Worker | None) -> None:
        if worker is not None:
            with lock:
                if worker in alive:
                    alive.remove(worker)
            worker.end()

    def serve() -> None:
        worker: Worker | None = None
        while not stopped.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                break
            asked = False
            try:
                if time.monotonic() >= until:
                    raise WorkerError("out of time")
                worker = worker or start()
                asked = True
                reply = worker.ask(tasks[number], min(seconds, until - time.monotonic()))
            except (WorkerError, OSError) as error:
                is_late = time.monotonic() >= until
                state = LEFT_OUT if is_late else "failed"
                reply = {"state": state, "reason": str(error), "broken": True, "asked": asked}
            if reply.get("broken"):
                drop(worker)
                worker = None
            done.put((number, reply))
        drop(worker)

    threads = [
        threading.Thread(target=serve, daemon=True) for _ in range(max(1, min(count, len(tasks))))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            yield done.get()
    finally:
        stopped.set()
        with lock:
            left = list(alive)
        for worker in left:
            worker.end()
        for thread in threads:
            thread.join()
