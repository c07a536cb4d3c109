# SPDX-License-Identifier: Apache-2.0
"""The reference of errors and exit codes, from the one table that decides them."""

from __future__ import annotations

import inspect

from generator.words import code, heading, prose, row, rows
from modelslim import api, errors
from modelslim.cli.errors import DONE, FAILED, INTERRUPTED, OUR_BUG, WRONG_INPUT, WRONG_PLUGIN, describe, exit_code

CODES = {
    DONE: "done",
    FAILED: "the run failed, memory ran out, or `verify` found faults",
    WRONG_INPUT: "an option, the protocol, the model or the data is wrong, or a question has no terminal",
    WRONG_PLUGIN: "a plugin, or the installation, is wrong",
    OUR_BUG: "a bug, of ModelSlim or of a plugin",
    INTERRUPTED: "interrupted, by Ctrl-C, SIGTERM or a closed terminal",
}


def errors_page() -> str:
    """Every error class with its exit code."""
    lines = [
        heading(1, "Errors and exit codes"),
        "An error says what is wrong, where, and what to do; several mistakes are told at once. With `--json` it is",
        '`{"error": {"kind": ..., "message": ..., "hint": ..., "diagnostics": [...]}}` on stdout, and `kind` is a name',
        "below.",
        "",
        heading(2, "Exit codes"),
        *rows(("code", "meaning"), (row(str(number), meaning) for number, meaning in CODES.items())),
        "",
        heading(2, "Errors"),
        "Those marked in the last column can be raised by plugins, from `modelslim.api`.",
        "",
    ]
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ModelSlimError)]
    table = [
        row(
            code(kind.__name__),
            str(exit_code(kind(""))),
            prose(inspect.getdoc(kind) or ""),
            "yes" if kind.__name__ in api.__all__ else "",
        )
        for kind in sorted(kinds, key=lambda kind: (exit_code(kind("")), kind.__name__))
    ]
    for error, meaning in (
        (MemoryError(), "Memory ran out, of the machine or of an accelerator."),
        (KeyboardInterrupt(), "Somebody, or the system, ended the program."),
        (ValueError(), "Anything that nobody raised on purpose."),
    ):
        table.append(row(code(describe(error).kind), str(exit_code(error)), meaning, ""))
    return "\n".join([*lines, *rows(("kind", "exit code", "meaning", "for plugins"), table)]) + "\n"
