# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar with the time left on a terminal, a line per unit elsewhere, events for programs."""

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
    if output.mode == "json":
        yield [("progress", _Events(output))]
        return
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
        bars.TextColumn("{task.fields[last]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield [("progress", _Bar(bar, output, what))]


def worst_error(record: Mapping[str, Any]) -> float | None:
    """Largest relative error among the linears of a unit; None when none was judged."""
    return max((one["relative_error"] for one in record.get("quality", {}).values()), default=None)


def memory(record: Mapping[str, Any]) -> int | None:
    """Most bytes that the process had held when the unit was done; None when that is not known."""
    return max(record.get("peak_memory_bytes", {}).values(), default=None)


def _figures(record: Mapping[str, Any]) -> list[str]:
    """Error and memory in words, as far as they are known."""
    error, peak = worst_error(record), memory(record)
    figures = [] if error is None else [f"error {error:.4f}"]
    return figures if peak is None else [*figures, f"{peak / 1e6:,.0f} MB"]


def _phases(name: str, record: Mapping[str, Any]) -> str:
    return f"{name}: " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in record["seconds"].items())


class _Clock:
    """Knows when the first unit began."""

    def __init__(self) -> None:
        self._start = 0.0

    def begin(self, index: int) -> None:
        if not index:
            self._start = time.monotonic()

    def left(self, index: int, total: int) -> float:
        return (time.monotonic() - self._start) / (index + 1) * (total - index - 1)


class _Lines(_Clock):
    """One line per finished unit."""

    def __init__(self, output: Output, what: str) -> None:
        super().__init__()
        self._output = output
        self._what = what

    @hookimpl
    def unit_started(self, index: int) -> None:
        self.begin(index)

    @hookimpl
    def unit_finished(self, name: str, index: int, total: int, record: Mapping[str, Any]) -> None:
        shown = [
            f"{len(record['linears'])} linears",
            *_figures(record),
            f"{sum(record['seconds'].values()):.2f} s",
            f"about {self.left(index, total):.0f} s left",
        ]
        self._output.note(f"[{index + 1}/{total}] {self._what} {name or 'outside the units'}: {', '.join(shown)}")
        self._output.debug(_phases(name, record))


class _Events(_Clock):
    """An event when a unit begins, and one when it is done."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    @hookimpl
    def unit_started(self, name: str, index: int, total: int) -> None:
        self.begin(index)
        self._output.event("unit_started", unit=name, index=index, total=total)

    @hookimpl
    def unit_finished(self, name: str, index: int, total: int, record: Mapping[str, Any]) -> None:
        self._output.event(
            "unit_finished",
            unit=name,
            index=index,
            total=total,
            linears=len(record["linears"]),
            relative_error=worst_error(record),
            seconds=record["seconds"],
            peak_memory_bytes=memory(record),
            seconds_left=round(self.left(index, total), 1),
        )


class _Bar:
    """A bar of units."""

    def __init__(self, bar: Any, output: Output, what: str) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=None, last="")
        self._output = output
        self._what = what

    @hookimpl
    def unit_started(self, name: str, total: int) -> None:
        self._bar.update(self._task, description=f"{self._what} {name}", total=total)

    @hookimpl
    def unit_finished(self, name: str, index: int, record: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=index + 1, last=", ".join(_figures(record)))
        self._output.debug(_phases(name, record))
