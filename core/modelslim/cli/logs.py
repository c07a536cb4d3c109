# SPDX-License-Identifier: Apache-2.0
"""How much is told: the level that the environment asks for, and what libraries and plugins log."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from modelslim.cli.output import Output
from modelslim.errors import UsageError, nearest

LEVELS: Mapping[str, int] = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
}
VARIABLES = ("MSMODELSLIM_LOG_LEVEL", "MODELSLIM_LOG_LEVEL")
"""The first that is set counts; the first one's name is the integration guide's."""
_OURS = ("modelslim", "msmodelslim")
# Transformers has a handler of its own, which the root's does not reach.
_VERBOSITY = "TRANSFORMERS_VERBOSITY"


def log_level(environ: Mapping[str, str]) -> int:
    """The level that the environment asks for; INFO by default.

    Raises:
        UsageError: it asks for none that there is.
    """
    name = next((name for name in VARIABLES if environ.get(name)), "")
    if not name:
        return logging.INFO
    word = environ[name].strip().upper()
    if word not in LEVELS:
        hint = nearest(word, LEVELS) or ""
        raise UsageError(f"{name} is {environ[name]!r}; it is one of {', '.join(LEVELS)}", hint=hint)
    return LEVELS[word]


@contextmanager
def messages_of_others(output: Output) -> Iterator[None]:
    """Tell what is logged meanwhile as the command's own words, and leave out what only developers want to know.

    Plugins that log under ``modelslim`` or ``msmodelslim`` are heard at the level that is set. Of libraries only
    errors are, and with DEBUG all from warnings on; the warnings that were left out are counted.
    """
    handler = _Handler(output)
    root, filters = logging.getLogger(), logging.WARNING
    loggers = [root, *map(logging.getLogger, _OURS)]
    before = [logger.level for logger in loggers]
    shown, verbosity = warnings.showwarning, os.environ.get(_VERBOSITY)
    if verbosity is None and output.level > logging.DEBUG:
        os.environ[_VERBOSITY] = "error"
    root.addHandler(handler)
    for logger, level in zip(loggers, (filters, output.level, output.level), strict=True):
        logger.setLevel(level)
    warnings.showwarning = handler.show_warning
    try:
        yield
    finally:
        warnings.showwarning = shown
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        root.removeHandler(handler)
        if verbosity is None:
            os.environ.pop(_VERBOSITY, None)
        if handler.unheard:
            what = "a warning" if handler.unheard == 1 else f"{handler.unheard} warnings"
            output.note(f"{what} of libraries not shown; {VARIABLES[0]}=DEBUG shows all")


class _Handler(logging.Handler):
    """Gives log records to an output."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self.unheard = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a record, or count it."""
        is_ours = record.name.split(".")[0] in _OURS
        text = record.getMessage() if is_ours else f"{record.name}: {record.getMessage()}"
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        if is_ours and record.levelno < logging.WARNING:
            (self._output.note if record.levelno >= logging.INFO else self._output.debug)(text)
        elif is_ours or record.levelno >= logging.ERROR:
            self._output.warn(text)
        else:
            self._leave(text)

    def show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """In place of ``warnings.showwarning``."""
        self._leave(f"{filename}:{lineno}: {category.__name__}: {message}")

    def _leave(self, text: str) -> None:
        if self._output.level <= logging.DEBUG:
            self._output.debug(text)
        else:
            self.unheard += 1
