# SPDX-License-Identifier: Apache-2.0
"""int8 codes of which all but a few outliers lie within four bits, so that they compress well."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, range_to_scale
from modelslim_sparse.columns import in_order, round_columns
from modelslim_sparse.hessian import Hessian

LOW, HIGH = -8, 7
"""Codes of all weights but outliers."""
_STEPS = 24  # scales that are tried for a row, from the largest value at HIGH to the largest value at 127
_HALVINGS = 40


def quantize(weight: Tensor, hessian: Hessian, spec: TensorSpec, fraction: float) -> QuantizedTensor:
    """Quantize a weight; each column makes up for the errors of those before it.

    Args:
        weight: float32 [out, in].
        hessian: of its input.
        spec: int8, per_channel, symmetric.
        fraction: share of the codes that may be outliers.
    """
    scale = find_scale(weight, hessian.norms.square(), spec, fraction)
    codes = (weight / scale).round_()
    outlier = (codes < LOW) | (codes > HIGH)
    grid = _Grid(scale, in_order(outlier, hessian), spec)
    values = round_columns(weight, hessian, grid)
    return QuantizedTensor((values / scale).round_().to(torch.int8), scale, None, spec)


def find_scale(weight: Tensor, energy: Tensor, spec: TensorSpec, fraction: float) -> Tensor:
    """The scale of each row: of all choices with no more outliers, that of the least error.

    A smaller scale makes the usual values more precise and more of the others outliers. Each row takes the scale of
    the least error plus what its outliers cost; the cost is the least that keeps the whole matrix within its share.

    Args:
        weight: float32 [out, in].
        energy: float32 [in], how much the squared error at each input counts.
        spec: int8, per_channel, symmetric.
        fraction: share of the codes that may be outliers.

    Returns:
        float32 [out, 1], as the engine will hold it.
    """
    largest = weight.abs().amax(1, keepdim=True)
    scales, errors, counts = [], [], []
    for step in range(_STEPS):
        bound = largest / HIGH * (HIGH / spec.qmax) ** (step / (_STEPS - 1)) * spec.qmax
        scale, _ = range_to_scale(-bound, bound, spec)
        codes = (weight / scale).round_().clamp_(spec.qmin, spec.qmax)
        scales.append(scale)
        counts.append(((codes < LOW) | (codes > HIGH)).sum(1))
        errors.append((codes.mul_(scale).sub_(weight).square_() @ energy).to(torch.float64))
    error, count = torch.stack(errors, 1), torch.stack(counts, 1)
    allowed = int(fraction * weight.numel())
    low, high = 0.0, float(error.max()) + 1.0  # at the high price no row takes an outlier
    for halving in range(_HALVINGS + 1):
        price = (low + high) / 2 if halving else low
        if int(count.gather(1, _best(error, count, price)).sum()) > allowed:
            low = price
        else:
            high = price
    return torch.cat(scales, 1).gather(1, _best(error, count, high))


def _best(error: Tensor, count: Tensor, price: float) -> Tensor:
    """Which scale each row takes, int64 [out, 1]."""
    return (error + price * count).argmin(1, keepdim=True)


class _Grid:
    """Codes of four bits, and of eight where outliers are: bool [in, out]."""

    def __init__(self, scale: Tensor, outlier: Tensor, spec: TensorSpec) -> None:
        self._scale = scale[:, 0]
        self._low = torch.where(outlier, float(spec.qmin), float(LOW))
        self._high = torch.where(outlier, float(spec.qmax), float(HIGH))

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """See ``Grid``."""
        codes = (values / self._scale).round_()
        return torch.clamp(codes, self._low[column], self._high[column]) * self._scale
