# SPDX-License-Identifier: Apache-2.0
"""What an exception means to the person at the command line: the one table of exit codes, and the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from modelslim.cli.hints import advice, message
from modelslim.errors import (
    CapabilityError,
    DatasetError,
    Diagnostic,
    InvalidDatasetError,
    ModelError,
    ModelSlimError,
    PluginError,
    ProtocolError,
    QuantizationError,
    RankError,
    SaveError,
    UsageError,
    VerificationError,
)

DONE = 0
FAILED = 1
WRONG_INPUT = 2
WRONG_PLUGIN = 3
OUR_BUG = 70
INTERRUPTED = 130

EXIT_CODES: Sequence[tuple[type[BaseException], int]] = (
    (QuantizationError, FAILED),
    (RankError, FAILED),
    (SaveError, FAILED),
    (VerificationError, FAILED),
    (UsageError, WRONG_INPUT),
    (ProtocolError, WRONG_INPUT),
    (CapabilityError, WRONG_INPUT),
    (ModelError, WRONG_INPUT),
    (DatasetError, WRONG_INPUT),
    (InvalidDatasetError, WRONG_INPUT),
    (PluginError, WRONG_PLUGIN),
    (ModelSlimError, FAILED),
    (click.ClickException, WRONG_INPUT),
    (click.Abort, INTERRUPTED),
    (KeyboardInterrupt, INTERRUPTED),
)
"""The first row whose type fits decides; what fits none is our bug."""

NAMED = frozenset({InvalidDatasetError.__name__})
"""Errors whose names people know from the integration guide and look for."""


@dataclass(frozen=True)
class Report:
    """An error in words.

    Attributes:
        kind: name of the error class, ``InternalError`` for our bug, ``Interrupted``.
        message: what is wrong.
        hint: what to do; empty when the message or the diagnostics say it.
        diagnostics: the single mistakes with their places.
    """

    kind: str
    message: str
    hint: str = ""
    diagnostics: tuple[Diagnostic, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The JSON object that stands for the error."""
        return {"error": asdict(self)}


def exit_code(error: BaseException) -> int:
    """The exit code that the error gives."""
    if is_out_of_memory(error):
        return FAILED
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), OUR_BUG)


def describe(error: BaseException) -> Report:
    """The error in words."""
    if isinstance(error, ModelSlimError):
        return Report(type(error).__name__, error.message, error.hint, tuple(error.diagnostics))
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hints = [advice(error), f"see `{context.command_path} --help`" if context is not None else ""]
        return Report("UsageError", message(error), "; ".join(filter(None, hints)).replace("?;", "?"))
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        by = f" by {error}" if str(error) not in ("", "SIGINT") else ""
        return Report("Interrupted", f"interrupted{by}")
    if is_out_of_memory(error):
        first, _, _ = str(error).partition("\n")
        return Report(
            "OutOfMemory",
            f"out of memory: {first}".removesuffix(": "),
            "all samples are held at once: calibrate on fewer, shorter texts and smaller images; of an adapter's "
            "units the largest must fit, so a large vision part is better visited block by block",
        )
    return Report(
        "InternalError",
        f"internal error: {type(error).__name__}: {error}".removesuffix(": "),
        "this is a bug, of ModelSlim or of a plugin; MSMODELSLIM_LOG_LEVEL=DEBUG shows the traceback",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True when memory ran out, of the machine or of an accelerator; torch has no common type for both."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
