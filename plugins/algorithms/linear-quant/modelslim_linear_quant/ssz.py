# SPDX-License-Identifier: Apache-2.0
"""ssz: scales fitted to the codes by least squares, codes rounded to the scales, in turn, until neither helps.

With the inputs known, the squared error at each weight counts as much as the energy of its input, ``diag(X^T X)``:
this is the error of the output where errors of different inputs are taken as uncorrelated. The error of the weight
alone misleads: it can fall in every linear while the model gets worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, range_to_scale
from modelslim_linear_quant.rows import as_counts, find_scales, held, round_to_steps, round_weight


def quantize(weight: Tensor, spec: TensorSpec, steps: int, energy: Tensor | None = None) -> QuantizedTensor:
    """Quantize a weight; its squared error is that of min-max or less, in every row and group.

    Args:
        weight: [out, in] or [experts, out, in]; floating, finite.
        spec: ``per_channel`` or ``per_group``.
        steps: how often a scale is fitted at most.
        energy: float32 [in] or [experts, in], the sum of squares of each input; None to count all alike.
    """
    counts = torch.ones(()) if energy is None else as_counts(energy, spec)
    scale, offset = find_scales(weight, spec, lambda values: fit(values, spec, steps, counts.to(values.device)))
    return round_weight(weight, scale, offset, spec)


def fit(values: Tensor, spec: TensorSpec, steps: int, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of each group.

    Args:
        values: float32 [..., inputs of a group].
        spec: the scheme.
        steps: how often a scale is fitted at most.
        counts: weight of each squared error, of a shape that broadcasts against ``values``.
    """
    scale, offset = range_to_scale(values.amin(-1), values.amax(-1), spec)
    codes = round_to_steps(values, scale, offset, spec)
    least = _error(values, codes, scale, counts)
    for _ in range(steps):
        trial, trial_offset = _refit(values, codes, scale, offset, spec, counts)
        trial_codes = round_to_steps(values, trial, trial_offset, spec)
        error = _error(values, trial_codes, trial, counts)
        better = error < least
        if not better.any():
            break
        scale = torch.where(better, trial, scale)
        if offset is not None and trial_offset is not None:
            offset = torch.where(better, trial_offset, offset)
        codes = torch.where(better.unsqueeze(-1), trial_codes, codes)
        least = torch.where(better, error, least)
    return scale, offset


def _refit(
    values: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, spec: TensorSpec, counts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scale that suits the codes best, then the offset that suits both."""
    counted = codes * counts
    power = (counted * codes).sum(-1)
    fitted = (counted * values).sum(-1) / power
    fitted = torch.where((power > 0) & (fitted > 0), fitted, scale)
    if offset is None:
        return held(fitted, None, spec)
    away = (codes - values / fitted.unsqueeze(-1)) * counts
    shift = (away.sum(-1) / counts.expand_as(values).sum(-1).clamp(min=1e-30)).round_()
    return held(fitted, (offset + shift).clamp_(spec.qmin, spec.qmax), spec)


def _error(values: Tensor, codes: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    return torch.addcmul(values, codes, scale.unsqueeze(-1), value=-1).square_().mul_(counts).sum(-1)
