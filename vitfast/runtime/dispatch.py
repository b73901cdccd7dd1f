"""Which backend runs a call: the first that can, in the op's order, or the one asked for by name.

A backend's `can_run` gives the list of reasons against; the same list serves the automatic choice
(quietly), a request by name (raised) and `vitfast info`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vitfast.errors import BackendUnavailableError, InputValueError
from vitfast.settings import logger, settings


def _proven(*args: Any, train: bool) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: "cpu", "vendor", "triton", "cuda" or "reference".
        forward: takes the op's arguments, gives its outputs.
        can_run: takes the same arguments, gives the reasons against; empty means yes.
        backward: takes the backward op's arguments; None for an inference-only backend.
        available: takes nothing, gives the reasons why it could never run on this machine.
        unproven: takes the op's arguments and `train`, whether the backward will be needed; says
            why the automatic choice leaves it alone although it can run: nothing shows yet that it
            is right and fast there. Empty: it does not.
        withdraw: takes what a call raised, and the arguments of `unproven`. Where a launch failed
            before it changed anything it has `unproven` object from now on, and says True: the
            call goes to the next backend, if nobody named this one. None: errors are the user's.
    """

    name: str
    forward: Callable[..., Any]
    can_run: Callable[..., list[str]]
    backward: Callable[..., Any] | None = None
    available: Callable[[], list[str]] = list
    unproven: Callable[..., str] = _proven
    withdraw: Callable[..., bool] | None = None


class Dispatcher:
    """The backends of one op, in order of preference; the last is the reference."""

    def __init__(self, op: str, backends: Sequence[Backend]) -> None:
        self.op = op
        self.backends = {b.name: b for b in backends}
        self.picked: str | None = None
        """The backend of the latest call, for reports."""
        self._logged: set[str] = set()

    def pick(self, name: str, *args: Any, needs_backward: bool = False) -> Backend:
        """The backend for a call with these arguments.

        Raises:
            InputValueError: no backend has this name.
            BackendUnavailableError: the backend asked for cannot run; lists the reasons.
        """
        if name == "auto":
            name = "reference" if settings.disable else settings.backend
        if name != "auto":
            return self._named(name, args, needs_backward)
        for backend in self.backends.values():
            if needs_backward and backend.backward is None:
                continue
            if not backend.can_run(*args) and not backend.unproven(*args, train=needs_backward):
                self._log(backend.name)
                return backend if backend.withdraw is None else self._guarded(backend, args)
        raise BackendUnavailableError(self.explain(args, needs_backward))

    def pick_backward(self, name: str, *args: Any) -> Callable[..., Any]:
        """The backward of the backend that `pick` gives for these arguments; raises as it does."""
        found = self.pick(name, *args, needs_backward=True).backward
        assert found is not None  # it was asked for
        return found

    def _guarded(self, backend: Backend, args: Sequence[Any]) -> Backend:
        """A backend whose place the next one takes, in a call with these arguments and from then
        on, where its kernels cannot be launched."""

        def run(which: str, train: bool, *given: Any) -> Any:
            try:
                return getattr(backend, which)(*given)
            except Exception as error:
                assert backend.withdraw is not None  # who has none is not guarded
                if not backend.withdraw(error, *args, train=train):
                    raise
            return getattr(self.pick("auto", *args, needs_backward=train), which)(*given)

        return replace(
            backend,
            forward=partial(run, "forward", False),
            backward=backend.backward and partial(run, "backward", True),
        )

    def _named(self, name: str, args: Sequence[Any], needs_backward: bool) -> Backend:
        backend = self.backends.get(name)
        if backend is None:
            raise InputValueError(
                f"{self.op}: no backend {name!r}; it has {', '.join(self.backends)}"
            )
        why = self.reasons(backend, args, needs_backward)
        if why:
            raise BackendUnavailableError(
                f"{self.op}: backend {name!r} was asked for and cannot run:\n  - "
                + "\n  - ".join(why)
            )
        self._log(name)
        return backend

    @staticmethod
    def reasons(backend: Backend, args: Sequence[Any], needs_backward: bool) -> list[str]:
        why = list(backend.can_run(*args))
        if needs_backward and backend.backward is None:
            why.append("it has no backward")
        return why

    def explain(self, args: Sequence[Any], needs_backward: bool = False) -> str:
        """Every backend with its reasons, one a line."""
        lines = [f"{self.op}: no backend can run this call"]
        for backend in self.backends.values():
            why = self.reasons(backend, args, needs_backward)
            why = why or [backend.unproven(*args, train=needs_backward) or "can run"]
            lines += [f"  {backend.name}: {reason}" for reason in why]
        return "\n".join(lines)

    def _log(self, name: str) -> None:
        self.picked = name
        if name not in self._logged:
            self._logged.add(name)
            logger.info("%s: using backend %s", self.op, name)
