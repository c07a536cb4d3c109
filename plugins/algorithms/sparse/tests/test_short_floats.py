# SPDX-License-Identifier: Apache-2.0
"""Short numbers against a table, and rounding with feedback against optimal brain quantization in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelslim_sparse.columns import round_columns
from modelslim_sparse.hessian import DAMPING, Hessian, decompose
from modelslim_sparse.short_floats import LONG, short, shorten


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def gram(columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.t() @ x


def error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    away = weight.double() - other.double()
    return float((away @ hessian.double() * away).sum())


def test_short_numbers_are_the_nearest_with_two_bits() -> None:
    table = [(1 + part / 4) * 2.0**power for power in range(-12, 12) for part in range(4)]
    values = torch.arange(0x3C00, 0x4400, dtype=torch.int16).view(torch.bfloat16).float()
    values = torch.cat([values, -values, values * 1.003])
    for value, found in zip(values.tolist(), short(values).tolist(), strict=True):
        away = sorted(abs(abs(value) - one) for one in table)
        assert abs(abs(value) - abs(found)) == away[0]
        assert abs(found) in table
        assert found * value > 0
    assert short(torch.tensor([0.0, 1.125, 1.375, 1.875])).tolist() == [0.0, 1.0, 1.5, 2.0]


class _Whole:
    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Multiples of 0.05."""
        return (values / 0.05).round() * 0.05


def test_feedback_is_that_of_optimal_brain_quantization() -> None:
    weight, hessian = random_weight(12, 200), gram(200)
    energy = hessian.double().diagonal()
    damped = hessian.double() + torch.diag(energy) * DAMPING
    inverse, values, found = torch.linalg.inv(damped), weight.double().clone(), torch.zeros(12, 200)
    for column in energy.argsort(descending=True).tolist():
        rounded = (values[:, column] / 0.05).round() * 0.05
        found[:, column] = rounded.float()
        missed = (values[:, column] - rounded) / inverse[column, column]
        values -= missed[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    actual = round_columns(weight, decompose(hessian), _Whole())
    # A value beside a half may round otherwise in float32, which then moves what follows.
    assert (actual - found).abs().gt(1e-6).double().mean() < 0.01


def test_experts_are_rounded_as_they_are_alone() -> None:
    weights, grams = random_weight(3, 12, 150), torch.stack([gram(150, seed) for seed in range(3)])
    together = shorten(weights, decompose(grams), torch.bfloat16, [12])
    for weight, own, found in zip(weights, grams, together, strict=True):
        alone = shorten(weight, decompose(own), torch.bfloat16, [12])
        assert (found != alone).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_but_the_largest_are_short_and_zeros_stay(dtype: torch.dtype) -> None:
    weight = random_weight(64, 96)
    weight = torch.where(weight.abs() > 0.04, weight, 0.0)
    found = shorten(weight, decompose(gram(96)), dtype, [64])
    assert found.dtype is dtype
    assert torch.equal(found == 0, weight == 0)
    long = found.float() != short(found.float())
    assert 0 < int(long.sum()) <= round(LONG * weight.numel())
    assert found.float().abs()[long].min() > found.float().abs().mean()


def test_output_is_nearer_than_by_rounding_each_alone() -> None:
    weight, hessian = random_weight(64, 96), gram(96)
    found = shorten(weight, decompose(hessian), torch.float32, [64])
    assert error(weight, found, hessian) < 0.5 * error(weight, short(weight), hessian)


def test_damping_is_raised_where_it_is_not_enough() -> None:
    # Rounding makes this one indefinite: the least eigenvalue is far below zero.
    broken = torch.full((8, 8), 1.0)
    broken[0, 1] = broken[1, 0] = -1.0
    hessian: Hessian = decompose(broken)
    assert float(hessian.damping) > DAMPING
    assert hessian.feedback.isfinite().all()
