# SPDX-License-Identifier: Apache-2.0
"""The reference of commands and options, from click's own objects."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module

import click

from generator.words import code, heading, literal, row, rows
from modelslim.cli.main import COMMANDS

_DEFAULT = re.compile(r"\s*\[default: (?P<default>.*)\]$")


def commands_page() -> str:
    """Every command with its arguments and options."""
    lines = [
        heading(1, "Commands and options"),
        "`modelslim COMMAND --help` says the same. Options with `_` are accepted with `-` as well. `msmodelslim` is",
        "another name of the program. [Errors and exit codes](errors.md) are those of every command.",
        "",
        *rows(
            ("command", "what it does"), (row(f"[{name}](#modelslim-{name})", line) for name, line in COMMANDS.items())
        ),
    ]
    for name in COMMANDS:
        lines += ["", *_command(f"modelslim {name}", import_module(f"modelslim.cli.{name}").command, 2)]
    return "\n".join(lines) + "\n"


def _command(path: str, command: click.Command, level: int) -> Iterator[str]:
    yield heading(level, path)
    yield literal(inspect.cleandoc(command.help or ""))
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option)]
    if arguments:
        yield ""
        yield from rows(("argument", "value"), (row(code(one.human_readable_name), _value(one)) for one in arguments))
    if options:
        yield ""
        yield from rows(("option", "value", "default", "meaning"), (_option(one) for one in options))
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield ""
            yield from _command(f"{path} {name}", sub, level + 1)


def _option(option: click.Option) -> str:
    names = ", ".join(code(name) for name in (*option.opts, *option.secondary_opts))
    text = option.help or ""
    found = _DEFAULT.search(text)
    if option.required:
        default = "required"
    elif found:
        default = found["default"]
    elif option.show_default:
        shown = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        default = ", ".join(code(one) for one in shown)
    else:
        default = ""
    return row(names, _value(option), default, _DEFAULT.sub("", text))


def _value(parameter: click.Parameter) -> str:
    """What the parameter takes, in words."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        words = ", ".join(code(one) for one in kind.choices)
    elif isinstance(kind, (click.IntRange, click.FloatRange)):
        words = "whole number" if isinstance(kind, click.IntRange) else "number"
        if kind.min is not None:
            words += f" above {kind.min}" if kind.min_open else f" from {kind.min}"
        if kind.max is not None:
            words += f" below {kind.max}" if kind.max_open else f" to {kind.max}"
    elif isinstance(kind, click.Path):
        words = "file" if not kind.dir_okay else "folder" if not kind.file_okay else "path"
    else:
        words = {"integer": "whole number", "float": "number", "text": "text"}[kind.name]
    return f"{words}; may be repeated" if parameter.multiple or parameter.nargs == -1 else words
