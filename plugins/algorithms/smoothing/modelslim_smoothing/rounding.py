# SPDX-License-Identifier: Apache-2.0
"""What rounding does to weights and inputs, for searches: the values that come back, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import TensorSpec, range_to_scale

_SSZ_TOLERANCE = 1e-10


def round_weight(weight: Tensor, spec: TensorSpec, steps: int = 0) -> Tensor:
    """Quantize and dequantize a weight.

    Args:
        weight: float32 [..., out, in].
        spec: ``per_channel`` or ``per_group``; the group size divides ``in``.
        steps: so many times at most, fit the scale to the codes by least squares and round again, and keep
            what lowers the squared error (ssz); 0 for min-max.
    """
    if spec.is_float:
        return weight
    groups = weight.view(*weight.shape[:-1], -1, spec.group_size or weight.shape[-1])
    scale, offset = range_to_scale(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), spec)
    best = _round(groups, scale, offset, spec)
    if steps and offset is None:
        best = _fit(groups, scale, best, spec, steps)
    return best.flatten(-2)


def round_input(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """Quantize and dequantize inputs.

    Args:
        x: float32 [..., tokens, channels].
        low, high: [..., channels], the ranges over all tokens of the calibration, for static scales.
        spec: ``per_tensor`` (static) or ``per_token`` (dynamic).
    """
    if spec.is_float:
        return x
    if spec.scope == "per_token":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        low, high = low.amin(-1)[..., None, None], high.amax(-1)[..., None, None]
    return _round(x, *range_to_scale(low, high, spec), spec)


def _round(values: Tensor, scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> Tensor:
    codes = (values / scale).round_()
    if offset is None:
        return codes.clamp_(spec.qmin, spec.qmax).mul_(scale)
    return codes.add_(offset).clamp_(spec.qmin, spec.qmax).sub_(offset).mul_(scale)


def _fit(groups: Tensor, scale: Tensor, best: Tensor, spec: TensorSpec, steps: int) -> Tensor:
    """Scales by least squares, where they lower the error of a group."""
    error = (best - groups).square().sum(-1, keepdim=True)
    for _ in range(steps):
        codes = best / scale
        fitted = (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1e-30)
        fitted = torch.where(fitted > 0, fitted, scale)
        tried = _round(groups, fitted, None, spec)
        lowered = (tried - groups).square().sum(-1, keepdim=True)
        better = lowered < error * (1 - _SSZ_TOLERANCE)
        if not better.any():
            break
        best, scale, error = (
            torch.where(better, new, old) for new, old in ((tried, best), (fitted, scale), (lowered, error))
        )
    return best
