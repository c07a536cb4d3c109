# SPDX-License-Identifier: Apache-2.0
"""Codes of few bits: their outliers counted, and their scales against all choices."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from modelslim.api import TensorSpec
from modelslim_sparse import low_bits
from modelslim_sparse.hessian import decompose
from modelslim_sparse.low_bits import HIGH, LOW, find_scale, quantize

SPEC = TensorSpec("int8", "per_channel", sparse=True)


def heavy_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """With a few values that are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return torch.where(torch.rand(weight.shape, generator=generator) < 0.005, weight * 15, weight)


def gram(columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.t() @ x


def error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    away = weight.double() - other.double()
    return float((away @ hessian.double() * away).sum())


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05])
def test_outliers_keep_to_their_share(fraction: float) -> None:
    weight = heavy_weight(64, 128)
    found = quantize(weight, decompose(gram(128)), SPEC, fraction)
    outliers = int(((found.codes < LOW) | (found.codes > HIGH)).sum())
    assert found.codes.dtype == torch.int8
    assert outliers <= fraction * weight.numel()
    assert outliers > 0.5 * fraction * weight.numel() or not fraction


def test_output_is_nearer_than_with_four_bits_alone_and_than_rounded_alone() -> None:
    weight, hessian = heavy_weight(64, 128), gram(128)
    found = quantize(weight, decompose(hessian), SPEC, 0.01)
    four = quantize(weight, decompose(hessian), SPEC, 0.0)
    alone = (weight / found.scale).round().clamp(-128, 127) * found.scale
    errors = [error(weight, one, hessian) for one in (found.dequantize(), four.dequantize(), alone)]
    assert errors[0] < 0.2 * errors[1]
    assert errors[0] < 0.5 * errors[2]


def test_no_choice_of_scales_with_as_few_outliers_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bits, "_STEPS", 8)
    weight, energy = heavy_weight(4, 64, seed=5), torch.linspace(0.5, 2, 64)

    def measure(scale: Tensor) -> tuple[float, int]:
        codes = (weight / scale).round().clamp(-128, 127)
        lost = ((codes * scale - weight).double().square() @ energy.double()).sum()
        return float(lost), int(((codes < LOW) | (codes > HIGH)).sum())

    found, count = measure(find_scale(weight, energy, SPEC, 0.03))
    assert 0 < count <= 0.03 * weight.numel()
    steps = torch.tensor([7 * (7 / 127) ** (step / 7) / 49 for step in range(8)])
    tried = weight.abs().amax(1, keepdim=True) * steps
    for choice in product(range(8), repeat=4):
        other, outliers = measure(tried.gather(1, torch.tensor(choice).view(4, 1)))
        assert outliers > count or other >= found * (1 - 1e-5)


def test_rows_of_zeros_and_scales_of_the_engine() -> None:
    weight = heavy_weight(8, 64)
    weight[3] = 0
    spec = TensorSpec("int8", "per_channel", scale_dtype="bfloat16", sparse=True)
    found = quantize(weight, decompose(gram(64)), spec, 0.01)
    assert not found.codes[3].any()
    assert (found.scale > 0).all()
    assert torch.equal(found.scale.bfloat16().float(), found.scale)
