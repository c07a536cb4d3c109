# SPDX-License-Identifier: Apache-2.0
"""histogram: the clipping range of an activation that makes the squared error of rounding it smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import Statistic, TensorSpec, range_to_scale

_PATTERNS = 1 << 16
_NUMBERS = 32  # how many bounds are tried at once
LOW, HIGH, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)


class Histogram(Statistic):
    """How often each value occurs, values taken to bfloat16.

    Bins that are bit patterns need no range in advance, so batches may come in any order, and instances
    merge exactly; activations in bfloat16 are counted as they are.

    Attributes:
        counts: int64 [65536], by the pattern as an int16 plus 32768; None before the first token.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Count the values of a batch."""
        if not x.numel():
            return
        patterns = x.to(torch.bfloat16).contiguous().view(torch.int16).flatten()
        if x.is_cpu:
            self._take(torch.bincount(patterns.to(torch.int32) + _PATTERNS // 2, minlength=_PATTERNS))
        else:  # bincount would wait for the device
            index = patterns.to(torch.int64) + _PATTERNS // 2
            counts = torch.zeros(_PATTERNS, dtype=torch.int64, device=x.device)
            self._take(counts.scatter_add_(0, index, torch.ones_like(index)))

    def merge(self, other: Statistic) -> None:
        """Add what another instance counted."""
        assert isinstance(other, Histogram)
        if other.counts is not None:
            self._take(other.counts)

    def values(self) -> tuple[Tensor, Tensor]:
        """The values that occur, float32 and ascending, NaN and infinity included, and how often: int64."""
        assert self.counts is not None
        occur = self.counts.nonzero().flatten()
        values = (occur - _PATTERNS // 2).to(torch.int16).view(torch.bfloat16).to(torch.float32)
        order = values.argsort()
        return values[order], self.counts[occur][order]

    def _take(self, counts: Tensor) -> None:
        self.counts = counts if self.counts is None else self.counts + counts


def best_range(values: Tensor, counts: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The range of least squared error, [1] and [1].

    Bounds are tried as shares of the full range over four decades, both together and each alone, then
    more closely around the best.

    Args:
        values: float32 [distinct values], finite.
        counts: [distinct values], how often each occurs.
        spec: the scheme.
    """
    weights = counts.to(torch.float32) / counts.sum()
    full = torch.stack([values.amin().clamp(max=0), values.amax().clamp(min=0)])
    if spec.symmetric:
        full = torch.stack([-full.abs().amax(), full.abs().amax()])
    best, least = full, _errors(values, weights, full.view(2, 1), spec).squeeze()
    wide = torch.logspace(0, -4, _NUMBERS, device=values.device)
    close = torch.logspace(-0.2, 0.2, 2 * _NUMBERS, device=values.device)
    sides = (BOTH,) if spec.symmetric else (BOTH, HIGH, LOW)
    for base, ratios in ((full, wide), (full, wide), (None, close)):
        for side in sides:
            bounds = best.unsqueeze(-1).repeat(1, len(ratios))
            origin = best if base is None else base
            bounds[side] = (origin.unsqueeze(-1) * ratios)[side]
            errors = _errors(values, weights, bounds, spec)
            index = errors.argmin()
            if errors[index] < least:
                best, least = bounds[:, index], errors[index]
    return best[0].view(1), best[1].view(1)


def _errors(values: Tensor, weights: Tensor, bounds: Tensor, spec: TensorSpec) -> Tensor:
    """Mean squared error of each range [2, ranges]: [ranges]."""
    scale, offset = range_to_scale(bounds[0], bounds[1], spec)
    steps = (values / scale.unsqueeze(-1)).round_()
    if offset is None:
        steps.clamp_(spec.qmin, spec.qmax)
    else:
        whole = offset.to(torch.float32).unsqueeze(-1)
        steps.clamp_(spec.qmin - whole, spec.qmax - whole)
    steps.mul_(scale.unsqueeze(-1)).sub_(values).square_()
    return steps @ weights
