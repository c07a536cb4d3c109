# SPDX-License-Identifier: Apache-2.0
"""Mean, spread and tails of the values at a port, as sums of powers that merge exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelslim.statistics import Statistic


class Moments(Statistic):
    """Central moments up to the fourth of all values at a port, tokens and channels alike.

    Held are the sums of powers of the distances from the mean. Sums of plain powers would cancel where the mean
    is large beside the spread; these are merged by the formulas for two sets with different means.

    Attributes:
        count: how many values were seen.
        peak: the largest magnitude among them; NaN when one of them is.
    """

    def __init__(self) -> None:
        self.count = 0
        self.peak: Tensor | None = None
        # Mean and sums of the second, third and fourth powers; float64, on the device of the activations.
        self._mean: Tensor | None = None
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Add a batch; each of its rows is summed in float32, and rows are summed in float64."""
        if not x.numel():
            return
        values = x.to(torch.float32)
        count = values.numel()
        center = values.mean()
        distance = values - center
        square = distance.square()
        first, second, third, fourth = (
            power.sum(1).sum(dtype=torch.float64) for power in (distance, square, square * distance, square.square())
        )
        # The centre is a float32 number; what lies between it and the mean is corrected for.
        offset = first / count
        sums = (
            second - count * offset**2,
            third - 3 * offset * second + 2 * count * offset**3,
            fourth - 4 * offset * third + 6 * offset**2 * second - 3 * count * offset**4,
        )
        self._take(count, values.abs().amax(), center.double() + offset, sums)

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, Moments)
        if other.peak is not None and other._mean is not None and other._sums is not None:
            self._take(other.count, other.peak, other._mean, other._sums)

    @property
    def std(self) -> float:
        """Standard deviation of the values; NaN before the first one."""
        return math.nan if self._sums is None else math.sqrt(float(self._sums[0]) / self.count)

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis, 0 for a normal distribution; NaN before the first value and where all are equal."""
        if self._sums is None or not float(self._sums[0]) > 0:
            return math.nan
        return self.count * float(self._sums[2]) / float(self._sums[0]) ** 2 - 3

    def _take(self, count: int, peak: Tensor, mean: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> None:
        if self.peak is None or self._mean is None or self._sums is None:
            self.count, self.peak, self._mean, self._sums = count, peak, mean, sums
            return
        n, m = float(self.count), float(count)
        total = n + m
        delta = mean - self._mean
        second, third, fourth = self._sums
        other2, other3, other4 = sums
        self._sums = (
            second + other2 + delta**2 * n * m / total,
            third + other3 + delta**3 * n * m * (n - m) / total**2 + 3 * delta * (n * other2 - m * second) / total,
            fourth
            + other4
            + delta**4 * n * m * (n * n - n * m + m * m) / total**3
            + 6 * delta**2 * (n * n * other2 + m * m * second) / total**2
            + 4 * delta * (n * other3 - m * third) / total,
        )
        self._mean = self._mean + delta * m / total
        self.count, self.peak = self.count + count, torch.maximum(self.peak, peak)
