# SPDX-License-Identifier: Apache-2.0
"""Where the commands write: data to stdout, words for people, or events for programs, to stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime, timezone
from typing import IO, Any, Literal

import click

from modelslim.cli.errors import NAMED, Report, describe

Mode = Literal["human", "json", "quiet"]


class Output:
    """One command's output.

    Attributes:
        mode: ``human``: tables on stdout, notes on stderr. ``json``: exactly one JSON document on
            stdout, events on stderr, one JSON object per line. ``quiet``: only warnings and errors, on stderr.
        level: what is told, as the levels of ``logging``: notes are INFO. Errors and results always are.
        command: the command line, for the report.
    """

    def __init__(self, mode: Mode = "human", level: int = logging.INFO) -> None:
        self.mode: Mode = mode
        self.level = level
        self.command: Sequence[str] = ()
        self._has_data = False

    @property
    def is_interactive(self) -> bool:
        """True when a progress bar on stderr would be seen by a person and disturb nothing."""
        return self.mode == "human" and _is_terminal(sys.stderr)

    def debug(self, text: str) -> None:
        """Tell those who look for a fault something."""
        if self.mode != "quiet" and self.level <= logging.DEBUG:
            self._tell("debug", text, click.style(text, dim=True))

    def note(self, text: str) -> None:
        """Tell people something."""
        if self.mode != "quiet" and self.level <= logging.INFO:
            self._tell("note", text, text)

    def warn(self, text: str) -> None:
        """Tell people something that they should act on."""
        if self.level <= logging.WARNING:
            self._tell("warning", text, f"{click.style('warning:', fg='yellow', bold=True)} {text}")

    def event(self, name: str, **fields: Any) -> None:
        """Tell programs something: a line with a JSON object on stderr; nothing unless the mode is json."""
        if self.mode == "json" and self.level <= logging.INFO:
            self._event(name, **fields)

    @contextmanager
    def foreign_prints(self) -> Iterator[None]:
        """What others print to stdout goes to stderr meanwhile; a plugin's words are no command's result."""
        with redirect_stdout(_Events(self) if self.mode == "json" else sys.stderr):
            yield

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show data to people; nothing unless the mode is human. Columns that are all empty make no header."""
        if self.mode != "human":
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # A file or a pipe gets whole lines, whatever their length; a terminal gets folded cells.
        width = None if _is_terminal(sys.stdout) else 10_000
        console = Console(file=sys.stdout, width=width, no_color=_no_color())
        table = Table(
            title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, show_header=any(columns)
        )
        for column in columns:
            table.add_column(Text(column, style="bold"), overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        with console.capture() as capture:
            console.print(table)
        for line in capture.get().splitlines():
            click.echo(line.rstrip(), color=False if _no_color() else None)

    def data(self, obj: Any) -> None:
        """Give the command's result to programs; nothing unless the mode is json.

        Raises:
            RuntimeError: a second document.
        """
        if self.mode == "json":
            self.document(obj)

    def document(self, obj: Any) -> None:
        """Write a JSON document to stdout in every mode, for commands whose result is one.

        Raises:
            RuntimeError: a second document.
        """
        if self._has_data:
            raise RuntimeError("a command writes one JSON document")
        text = json.dumps(obj, indent=2, allow_nan=False)
        self._has_data = True
        click.echo(text)

    def error(self, error: BaseException) -> None:
        """Report the error that ends the command: in json mode as the document, else to people."""
        report = describe(error)
        if self.mode == "json":
            if self._has_data:
                self._event("error", **report.as_data()["error"])
            else:
                self.document(report.as_data())
        else:
            self._say(_lines(report))

    def _tell(self, kind: str, text: str, styled: str) -> None:
        if self.mode == "json":
            self._event(kind, text=text)
        else:
            self._say(styled)

    def _event(self, name: str, **fields: Any) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        click.echo(json.dumps({"event": name, "time": now, **fields}, ensure_ascii=False), err=True)

    def _say(self, text: str) -> None:
        click.echo(text, err=True, color=False if _no_color() else None)


class _Events(io.TextIOBase):
    """A stream whose lines become events."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._rest = ""

    def write(self, text: str) -> int:
        """Take in text; every whole line becomes an event."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._output.event("print", text=line)
        return len(text)


pass_output = click.make_pass_decorator(Output, ensure=True)
"""Gives a command its Output as first argument."""


def _lines(report: Report) -> str:
    """An error for people: the message, one line per diagnostic with its hint below, the hint."""
    hint = click.style("hint:", fg="cyan")
    name = f"{report.kind}: " if report.kind in NAMED else ""
    lines = [f"{click.style('error:', fg='red', bold=True)} {name}{report.message}"]
    for diagnostic in report.diagnostics:
        lines.append(": ".join(part for part in (diagnostic.place, diagnostic.path, diagnostic.message) if part))
        if diagnostic.hint:
            lines.append(f"    {hint} {diagnostic.hint}")
    if report.hint:
        lines.append(f"{hint} {report.hint}")
    return "\n".join(lines)


def _is_terminal(stream: IO[str] | None) -> bool:
    """False for a file, a pipe, and a stream that was closed before the program began."""
    return stream is not None and stream.isatty()


def _no_color() -> bool:
    return bool(os.environ.get("NO_COLOR"))
