"""The dispatcher takes the first backend that can, or the one asked for, and says why not."""

from __future__ import annotations

import logging

import pytest

from vitfast.errors import BackendUnavailableError, InputValueError
from vitfast.runtime.dispatch import Backend, Dispatcher
from vitfast.settings import settings


def _no_negative(x):
    return [f"x is {x}, and it takes no negative number"] if x < 0 else []


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher(
        "op",
        [
            Backend("fast", lambda x: ("fast", x), _no_negative, lambda g: ("fast", g)),
            Backend("forward_only", lambda x: ("forward_only", x), lambda x: []),
            Backend("reference", lambda x: ("reference", x), lambda x: [], lambda g: g),
        ],
    )


def test_the_first_that_can_is_taken(dispatcher):
    assert dispatcher.pick("auto", 1).name == "fast"
    assert dispatcher.pick("auto", -1).name == "forward_only"
    assert dispatcher.pick("auto", -1, needs_backward=True).name == "reference"


def test_a_backend_by_name_is_taken_or_raises_with_reasons(dispatcher):
    assert dispatcher.pick("reference", 1).name == "reference"
    with pytest.raises(BackendUnavailableError, match=r"(?s)op: backend 'fast'.*x is -1"):
        dispatcher.pick("fast", -1)
    with pytest.raises(BackendUnavailableError, match="no backward"):
        dispatcher.pick("forward_only", 1, needs_backward=True)


def test_an_unknown_backend_names_the_known_ones(dispatcher):
    with pytest.raises(InputValueError, match="no backend 'cuda'; it has fast, forward_only, ref"):
        dispatcher.pick("cuda", 1)


def test_the_setting_is_a_request_by_name(dispatcher):
    settings.backend = "reference"
    assert dispatcher.pick("auto", 1).name == "reference"
    dispatcher = Dispatcher(
        "op", [Backend("cpu", print, _no_negative), dispatcher.backends["reference"]]
    )
    settings.backend = "cpu"
    with pytest.raises(BackendUnavailableError):
        dispatcher.pick("auto", -1)
    assert dispatcher.pick("reference", -1).name == "reference"


def test_disabled_means_reference(dispatcher):
    settings.disable = True
    assert dispatcher.pick("auto", 1).name == "reference"


def test_nothing_can_run_lists_every_reason():
    dispatcher = Dispatcher("op", [Backend("fast", print, _no_negative)])
    with pytest.raises(BackendUnavailableError, match=r"(?s)no backend can run.*fast: x is -2"):
        dispatcher.pick("auto", -2)


def test_explain_has_a_line_for_every_backend(dispatcher):
    text = dispatcher.explain((-3,), needs_backward=True)
    assert "fast: x is -3" in text
    assert "forward_only: it has no backward" in text
    assert "reference: can run" in text


def test_each_pick_is_logged_once(dispatcher, caplog):
    with caplog.at_level(logging.INFO, "vitfast"):
        for _ in range(3):
            dispatcher.pick("auto", 1)
            dispatcher.pick("reference", 1)
    assert [r.getMessage() for r in caplog.records] == [
        "op: using backend fast",
        "op: using backend reference",
    ]
