# SPDX-License-Identifier: Apache-2.0
"""mse: the range of each row or group that makes the squared error of the output, or of the weight, smallest.

Cutting the range off costs the largest weights and makes the steps finer for all others. With the
inputs known, a weight's error counts as much as the energy of its input, ``diag(X^T X)``: this is the
error of the output where errors of different inputs are taken as uncorrelated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, range_to_scale
from modelslim_linear_quant.rows import as_counts, clip_, find_scales, round_weight


def ratios(spec: TensorSpec) -> tuple[float, ...]:
    """The shares of the full range that are tried: down to 0.4, and for less than 4 bits down to 0.2."""
    return tuple(1 - 0.04 * index for index in range(16 if spec.bits >= 4 else 21))


def quantize(weight: Tensor, spec: TensorSpec, energy: Tensor | None) -> QuantizedTensor:
    """Quantize a weight to nearest, on the best range.

    Args:
        weight: [out, in] or [experts, out, in]; floating, finite.
        spec: ``per_channel`` or ``per_group``.
        energy: [in] or [experts, in], the sum of squares of each input; None to count all alike.
    """
    scale, offset = best_scales(weight, spec, energy)
    return round_weight(weight, scale, offset, spec)


def best_scales(weight: Tensor, spec: TensorSpec, energy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and offset [.., out, groups] of the best ranges; arguments as for ``quantize``."""
    counts = None if energy is None else as_counts(energy, spec)
    return find_scales(weight, spec, lambda values: search(values, spec, counts))


def search(values: Tensor, spec: TensorSpec, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Try all shares of the range.

    Args:
        values: float32 [..., inputs of a group].
        spec: the scheme.
        counts: weight of each squared error, of a shape that broadcasts against ``values``; None for 1.

    Returns:
        scale and offset [...]; of equal ones those of the widest range.
    """
    low, high = values.amin(-1), values.amax(-1)
    scale, offset = range_to_scale(low, high, spec)
    least = _error(values, scale, offset, spec, counts)
    for ratio in ratios(spec)[1:]:
        trial, trial_offset = range_to_scale(low * ratio, high * ratio, spec)
        error = _error(values, trial, trial_offset, spec, counts)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, trial, scale)
        if offset is not None and trial_offset is not None:
            offset = torch.where(better, trial_offset, offset)
    return scale, offset


def _error(values: Tensor, scale: Tensor, offset: Tensor | None, spec: TensorSpec, counts: Tensor | None) -> Tensor:
    exact = values * scale.reciprocal().unsqueeze(-1)
    steps = exact.round()
    clip_(steps, None if offset is None else offset.unsqueeze(-1), spec)
    steps.sub_(exact).square_()
    if counts is not None:
        steps.mul_(counts)
    return steps.sum(-1) * (scale * scale)
