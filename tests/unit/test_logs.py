# SPDX-License-Identifier: Apache-2.0
"""How much is told, to people and to programs, and what becomes of the words of libraries and plugins."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import pytest

from modelslim.cli.logs import log_level, messages_of_others
from modelslim.cli.output import Output
from modelslim.errors import UsageError


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, logging.INFO),
        ({"MSMODELSLIM_LOG_LEVEL": ""}, logging.INFO),
        ({"MSMODELSLIM_LOG_LEVEL": "debug"}, logging.DEBUG),
        ({"MODELSLIM_LOG_LEVEL": " Warning "}, logging.WARNING),
        ({"MODELSLIM_LOG_LEVEL": "DEBUG", "MSMODELSLIM_LOG_LEVEL": "ERROR"}, logging.ERROR),
    ],
)
def test_the_level_is_that_of_the_environment(environ: dict[str, str], level: int) -> None:
    assert log_level(environ) == level


def test_a_level_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="MSMODELSLIM_LOG_LEVEL is 'DEBUGG'") as caught:
        log_level({"MSMODELSLIM_LOG_LEVEL": "DEBUGG"})
    assert caught.value.hint == "did you mean 'DEBUG'?"


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (logging.DEBUG, ["a detail", "a note", "warning: a warning"]),
        (logging.INFO, ["a note", "warning: a warning"]),
        (logging.WARNING, ["warning: a warning"]),
        (logging.ERROR, []),
    ],
)
def test_a_level_leaves_out_what_is_below_it(level: int, told: list[str], capsys: Any) -> None:
    output = Output(level=level)
    output.debug("a detail")
    output.note("a note")
    output.warn("a warning")
    output.event("nothing", for_people=True)
    assert capsys.readouterr().err.splitlines() == told
    output.error(UsageError("an error"))
    assert capsys.readouterr().err == "error: an error\n"


def test_programs_get_events_one_object_per_line(capsys: Any) -> None:
    output = Output("json")
    output.note("a note\nof two lines, 语")
    output.warn("a warning")
    output.event("unit_finished", unit="layers.0", index=0)
    with output.foreign_prints():
        print("a plugin", "says")
    output.data({"done": True})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"done": True}
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert all(event.pop("time").endswith("+00:00") for event in events)
    assert events == [
        {"event": "note", "text": "a note\nof two lines, 语"},
        {"event": "warning", "text": "a warning"},
        {"event": "unit_finished", "unit": "layers.0", "index": 0},
        {"event": "print", "text": "a plugin says"},
    ]


def speak() -> None:
    """What libraries and plugins say."""
    logging.getLogger("modelslim.vendor").info("of the plugin")
    logging.getLogger("msmodelslim").warning("by the name of the existing tool")
    logging.getLogger("modelslim.vendor").debug("detail")
    logging.getLogger("library").warning("library warns")
    logging.getLogger("library").info("library talks")
    logging.getLogger("library").error("library fails")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("python warns", UserWarning, "file.py", 3)


def test_warnings_of_libraries_do_not_get_in_the_way_and_are_counted(capsys: Any) -> None:
    root, shown = logging.getLogger(), warnings.showwarning
    before = (root.level, list(root.handlers))
    with messages_of_others(Output()):
        speak()
    assert capsys.readouterr().err.splitlines() == [
        "of the plugin",
        "warning: by the name of the existing tool",
        "warning: library: library fails",
        "2 warnings of libraries not shown; MSMODELSLIM_LOG_LEVEL=DEBUG shows all",
    ]
    assert (root.level, list(root.handlers), warnings.showwarning) == (*before, shown)
    with messages_of_others(Output(level=logging.DEBUG)):
        speak()
    assert capsys.readouterr().err.splitlines() == [
        "of the plugin",
        "warning: by the name of the existing tool",
        "detail",
        "library: library warns",
        "warning: library: library fails",
        "file.py:3: UserWarning: python warns",
    ]


def test_an_exception_that_a_plugin_logs_comes_with_its_traceback(capsys: Any) -> None:
    with messages_of_others(Output()):
        try:
            raise ValueError("inside")
        except ValueError:
            logging.getLogger("modelslim.vendor").exception("it failed")
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("warning: it failed", "ValueError: inside")
