# SPDX-License-Identifier: Apache-2.0
"""Plots as plain numbers for inline SVG: places in percent, so that text keeps its size at every width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHADES = 6
_LEAST = math.log10(5)
"""Room of a logarithmic scale whose values are nearly the same, so that what is small looks small."""


@dataclass(frozen=True)
class Series:
    """Values along the units.

    Attributes:
        label: what they are.
        points: place from left and from top in percent, and what to say of it.
        lines: the same joined, as points of polylines; a gap begins a new one.
    """

    label: str
    points: Sequence[tuple[float, float, str]]
    lines: Sequence[str]


@dataclass(frozen=True)
class Panel:
    """Values over the units.

    Attributes:
        title: what is shown.
        height: in pixels.
        series: the values.
        ticks: place from the top in percent, and the number there.
        first, last: names of the units at both ends.
        summary: the same in words, for who cannot see it.
    """

    title: str
    height: int
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]]
    first: str
    last: str
    summary: str


def panel(
    title: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    among: Iterable[float | None] | None = None,
    log: bool = True,
    unit: str = "",
    height: int = 140,
) -> Panel | None:
    """A panel; None when there is no value.

    Args:
        title: what is shown.
        names: names of the units.
        series: label and one value per unit; None where there is none.
        among: values that share the scale; those of the series by default.
        log: a logarithmic scale, on which zeros lie at the bottom; else one from zero.
        unit: stands behind every number.
        height: in pixels.
    """
    pool = [value for _, values in series for value in values] if among is None else list(among)
    known = [value for value in pool if value is not None and math.isfinite(value)]
    if not any(value is not None for _, values in series for value in values):
        return None
    low, high, marks = _log_scale(known) if log else _linear_scale(known)

    def place(value: float) -> float:
        if log:
            value = math.log10(max(value, 10**low))
        return 100 - 100 * (min(value, high) - low) / (high - low)

    width = max(len(names) - 1, 1)
    drawn = []
    for label, values in series:
        points: list[tuple[float, float, str]] = []
        runs: list[list[str]] = [[]]
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                runs.append([])
                continue
            x, y = round(100 * index / width if len(names) > 1 else 50, 2), round(place(value), 2)
            points.append((x, y, f"{name}: {label} {_say(value)}{unit}"))
            runs[-1].append(f"{x},{y}")
        drawn.append(Series(label, points, [" ".join(run) for run in runs if len(run) > 1]))
    seen = [value for _, values in series for value in values if value is not None]
    summary = f"{title}: {_say(min(seen))}{unit} to {_say(max(seen))}{unit} over {len(names)} units"
    ticks = [(round(place(mark), 2), f"{_say(mark)}{unit}") for mark in marks]
    return Panel(title, height, drawn, ticks, names[0], names[-1], summary)


@dataclass(frozen=True)
class HeatMap:
    """Tokens of each expert of each layer, against what it would get if all got the same.

    Attributes:
        columns, rows: how many experts and layers.
        shades: a path per shade, in units of a cell; the first one is for experts without tokens.
        limits: the least and the most of each shade but the first, in words.
    """

    columns: int
    rows: int
    shades: Sequence[str]
    limits: Sequence[str]


def heat_map(layers: Sequence[Sequence[int]]) -> HeatMap:
    """The map of layers of experts; each row is shaded by its own mean."""
    paths = [""] * (SHADES + 1)
    for row, tokens in enumerate(layers):
        mean = sum(tokens) / len(tokens) or 1
        shades = [_shade(seen / mean) for seen in tokens]
        start = 0
        for column in range(1, len(shades) + 1):
            if column == len(shades) or shades[column] != shades[start]:
                paths[shades[start]] += f"M{start} {row}h{column - start}v1h-{column - start}z"
                start = column
    limits = ["below 1/4", "1/4 to 1/2", "1/2 to 1", "1 to 2", "2 to 4", "above 4"]
    return HeatMap(max(map(len, layers)), len(layers), paths, limits)


def _shade(share: float) -> int:
    if not share:
        return 0
    return min(max(math.floor(math.log2(share)) + 4, 1), SHADES)


def _log_scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Both ends as logarithms, and marks at 1, 2 and 5 times powers of ten, not more than a few."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    room = max((high - low) * 0.06, (_LEAST - (high - low)) / 2)
    low, high = low - room, high + room
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [
            step * 10.0**power for power in powers for step in steps if low <= math.log10(step * 10.0**power) <= high
        ]
        if len(marks) <= 5:
            return low, high, marks or [10 ** ((low + high) / 2)]
    return low, high, marks[:: -(-len(marks) // 5)]


def _linear_scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    most = max(values, default=1.0) or 1.0
    power = 10.0 ** math.floor(math.log10(most))
    step = next(step * power for step in (0.2, 0.25, 0.5, 1, 2) if most / (step * power) <= 5)
    return 0.0, most * 1.06, [step * count for count in range(int(most / step) + 1)]


def _say(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
