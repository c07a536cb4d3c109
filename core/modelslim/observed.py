# SPDX-License-Identifier: Apache-2.0
"""What calibration has shown of a unit: ranges of its inputs before and after smoothing, and the divisors between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modelslim.statistics import ChannelRange, TensorRange
from modelslim.unit_statistics import UnitStatistics

Range = ChannelRange | TensorRange


class Observed:
    """Ranges at the ports of a unit; what no algorithm asked for was not measured and is missing.

    Attributes:
        before: as the float model has them, by the name of a linear; all experts of a layer together.
        after: as quantization met them.
        divisors: float32 [channels], or [experts, channels], by which the inputs of a linear were divided.
    """

    def __init__(self) -> None:
        self.before: dict[str, Range] = {}
        self.after: dict[str, Range] = {}
        self.divisors: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}

    def enter(self, statistics: UnitStatistics) -> None:
        """Take in what a pass measured, before its algorithms work."""
        for names, port in _ranges(statistics):
            if names[0] not in self.before:
                self.before.update(dict.fromkeys(names, port))
                self._groups[names[0]] = names

    def leave(self, statistics: UnitStatistics) -> None:
        """Take in what became of it."""
        for names, port in _ranges(statistics):
            self.after.update(dict.fromkeys(names, port))
        for name, divisor in statistics.divisors.items():
            self.divisors[name] = divisor * self.divisors[name] if name in self.divisors else divisor

    def as_data(self) -> list[dict[str, Any]]:
        """One JSON object per port: its linears, and its outliers ``before`` and, where it was smoothed, ``after``.

        ``largest`` is the largest magnitude, ``typical`` the median of the channels' largest ones, None where
        channels were not told apart.
        """
        found = []
        for names in self._groups.values():
            entry: dict[str, Any] = {"linears": names, "before": _outliers(self.before[names[0]])}
            if names[0] in self.divisors:
                entry["after"] = _outliers(self.after[names[0]])
            if entry["before"] is not None:
                found.append(entry)
        return found


def _ranges(statistics: UnitStatistics) -> Iterator[tuple[list[str], Range]]:
    """The range of each port, with the linears that read it."""
    groups: dict[int, tuple[list[str], Range]] = {}
    found: dict[str, list[Any]] = dict(statistics.measured(ChannelRange))
    for name, others in statistics.measured(TensorRange):
        found.setdefault(name, others)
    for name, parts in found.items():
        if id(parts[0]) not in groups:
            groups[id(parts[0])] = ([], _merged(parts))
        groups[id(parts[0])][0].append(name)
    yield from groups.values()


def _merged(parts: list[Any]) -> Range:
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]
    whole: Range = type(parts[0])()
    for part in parts:
        whole.merge(part)
    return whole


def _outliers(port: Range) -> dict[str, float | None] | None:
    if port.minimum is None or port.maximum is None:
        return None
    largest = torch.maximum(port.minimum.abs(), port.maximum.abs()).to(torch.float32)
    return {
        "largest": _number(largest.amax()),
        "typical": _number(largest.median()) if isinstance(port, ChannelRange) else None,
    }


def _number(value: Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None
