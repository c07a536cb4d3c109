# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar with the time left on a terminal, a line per unit elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from modelslim.cli.output import Output
from modelslim.hookspecs import hookimpl


@contextmanager
def progress(output: Output, what: str) -> Iterator[list[tuple[str, object]]]:
    """Observers that show how far a run is, for the time of the context.

    Args:
        output: where the command writes.
        what: what is going on, such as ``quantizing``.
    """
    if not output.is_interactive:
        yield [("progress", _Lines(output, what))]
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("elapsed"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield [("progress", _Bar(bar, what))]


class _Lines:
    """One line per finished unit."""

    def __init__(self, output: Output, what: str) -> None:
        self._output = output
        self._what = what
        self._start = 0.0

    @hookimpl
    def unit_started(self, index: int) -> None:
        if not index:
            self._start = time.monotonic()

    @hookimpl
    def unit_finished(self, name: str, index: int, total: int, record: Mapping[str, Any]) -> None:
        elapsed = time.monotonic() - self._start
        left = elapsed / (index + 1) * (total - index - 1)
        self._output.note(
            f"[{index + 1}/{total}] {self._what} {name or 'outside the units'}: {len(record['linears'])} linears, "
            f"{sum(record['seconds'].values()):.2f} s, about {left:.0f} s left"
        )


class _Bar:
    """A bar of units."""

    def __init__(self, bar: Any, what: str) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=None)
        self._what = what

    @hookimpl
    def unit_started(self, name: str, total: int) -> None:
        self._bar.update(self._task, description=f"{self._what} {name}", total=total)

    @hookimpl
    def unit_finished(self, index: int) -> None:
        self._bar.update(self._task, completed=index + 1)
