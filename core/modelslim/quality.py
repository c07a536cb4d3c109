# SPDX-License-Identifier: Apache-2.0
"""How far a quantized linear is from the float one, on a sample of the tokens that calibrated it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.devices import bfloat16_products
from modelslim.experts import ExpertLinear
from modelslim.quantized import QuantizedExperts, QuantizedLinear
from modelslim.row_sample import RowSample
from modelslim.unit_statistics import UnitStatistics

_BLOCK = 1 << 22  # values of a weight that are float32 at once


@dataclass(frozen=True)
class Quality:
    """What quantization did to one linear, or to the experts of one weight together.

    Attributes:
        relative_error: ``|y - y_float| / |y_float|``, Frobenius norms over the sampled tokens.
        snr_db: signal to noise in decibels, ``-20 log10(relative_error)``; None when nothing is lost.
        clipped: share of the sampled activations beyond the range of a static scale; 0 for others.
        tokens: how many tokens the sample holds.
    """

    relative_error: float
    snr_db: float | None
    clipped: float
    tokens: int

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def float_outputs(linears: Mapping[str, nn.Module], statistics: UnitStatistics) -> dict[str, Tensor]:
    """Outputs of float linears on their sampled inputs, in float32; those that no token reached are missing.

    Args:
        linears: nn.Linear and ExpertLinear modules by name, before an algorithm changes them.
        statistics: holds a ``RowSample`` of each.
    """
    outputs = {}
    for name, linear in linears.items():
        rows, counts = _rows(linear, name, statistics)
        if len(rows):
            outputs[name] = _compute(linear, rows, counts)
    return outputs


def judge(
    modules: Mapping[str, QuantizedLinear], statistics: UnitStatistics, expected: Mapping[str, Tensor]
) -> dict[str, Quality]:
    """Compare quantized linears with what the float ones gave.

    Args:
        modules: the quantized linears by name.
        statistics: a ``RowSample`` of each, having followed every rescaling.
        expected: what ``float_outputs`` gave before.
    """
    found = {}
    for name, module in modules.items():
        if name in expected:
            rows, counts = _rows(module, name, statistics)
            rows = rows.to(torch.float32)
            y = module(rows, counts) if isinstance(module, QuantizedExperts) else module(rows)
            found[name] = _quality(y, expected[name], _clipped(module, rows, counts))
    return found


def _rows(linear: nn.Module, name: str, statistics: UnitStatistics) -> tuple[Tensor, list[int]]:
    """Sampled inputs; for experts one after the other, with the number of each."""
    if isinstance(linear, (ExpertLinear, QuantizedExperts)):
        samples = [sample.rows for sample in statistics.get_experts(name, RowSample)]
        kept = [rows for rows in samples if rows is not None]
        counts = [0 if rows is None else len(rows) for rows in samples]
        return torch.cat(kept) if kept else torch.empty(0, 0), counts
    found = statistics.get(name, RowSample).rows
    return (torch.empty(0, 0) if found is None else found), []


def _compute(linear: nn.Module, rows: Tensor, counts: Sequence[int]) -> Tensor:
    if isinstance(linear, ExpertLinear):
        parts = [
            _product(part, linear.weight[expert]) + (0 if linear.bias is None else linear.bias[expert])
            for expert, part in enumerate(torch.split(rows, list(counts)))
            if len(part)
        ]
        return torch.cat(parts)
    assert isinstance(linear, nn.Linear)
    y = _product(rows, linear.weight)
    return y if linear.bias is None else y.add_(linear.bias)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.t()`` in float32, some rows of the weight at a time: a float32 copy of all would be the largest
    thing in memory."""
    exact = rows if weight.dtype == rows.dtype else rows.to(torch.float32)
    wide = rows.to(torch.float32)
    with bfloat16_products(exact):
        parts = [wide @ part.to(torch.float32).t() for part in torch.split(weight, max(1, _BLOCK // weight.shape[1]))]
    return torch.cat(parts, 1)


def _clipped(module: QuantizedLinear, rows: Tensor, counts: Sequence[int]) -> float:
    if module.input_scale is None or module.input_offset is None:
        return 0.0
    spec = module.spec.activation
    scale, offset = module.input_scale, module.input_offset
    if isinstance(module, QuantizedExperts):
        repeats = torch.tensor(counts, device=rows.device)
        scale, offset = scale.repeat_interleave(repeats, 0), offset.repeat_interleave(repeats, 0)
    codes = (rows / scale).round() + (0 if spec.symmetric else offset)
    return float(((codes < spec.qmin) | (codes > spec.qmax)).float().mean())


def _quality(y: Tensor, expected: Tensor, clipped: float) -> Quality:
    power = float(expected.double().pow(2).sum())
    noise = float((y.double() - expected.double()).pow(2).sum())
    error = math.sqrt(noise / power) if power else (0.0 if not noise else math.inf)
    snr = -20 * math.log10(error) if 0 < error < math.inf else None
    return Quality(round(error, 6), None if snr is None else round(snr, 2), round(clipped, 6), len(y))
