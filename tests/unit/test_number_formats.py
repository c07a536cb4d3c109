# SPDX-License-Identifier: Apache-2.0
"""Small floating-point numbers against tables and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from modelslim.number_formats import (
    e2m1_nibbles,
    from_e2m1_nibbles,
    from_e8m0,
    power_of_two,
    to_e2m1,
    to_e4m3,
    to_e8m0,
)

FLOAT4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_values() -> list[float]:
    """All finite float8 values that are not negative, from their bits."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [
        (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(1, 16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ]
    return subnormal + normal


def nearest(value: float, table: list[float]) -> float:
    """The nearest entry, of two the one at an even place."""
    size = min(abs(value), table[-1])
    best = min(range(len(table)), key=lambda index: (abs(table[index] - size), index % 2))
    return math.copysign(table[best], value)


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, generator=generator, dtype=torch.float64) * 3
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 0.0], dtype=torch.float64)
    return torch.cat([spread, ties, -ties]).to(torch.float32)


def test_float4_is_the_nearest_with_ties_to_even(values):
    expected = [nearest(float(value), FLOAT4) for value in values]
    assert (to_e2m1(values) / 2).tolist() == pytest.approx(expected, abs=0)


def test_float8_is_the_nearest_with_ties_to_even(values):
    table = e4m3_values()
    wide = torch.cat([values * 100, values / 1000, torch.tensor([448.0, 463.9, 464.0, 1e9, -1e9])])
    expected = [nearest(float(value), table) for value in wide]
    assert to_e4m3(wide).to(torch.float32).tolist() == pytest.approx(expected, abs=0)


def test_nibbles_are_those_of_the_format():
    codes = torch.tensor([int(2 * value) for value in FLOAT4] + [-int(2 * value) for value in FLOAT4[1:]])
    nibbles = e2m1_nibbles(codes.to(torch.int8))
    assert nibbles.tolist() == [*range(8), *range(9, 16)]
    assert torch.equal(from_e2m1_nibbles(nibbles), codes.to(torch.int8))
    assert from_e2m1_nibbles(torch.tensor([8], dtype=torch.uint8)).item() == 0


@pytest.mark.parametrize("value", [1.0, 0.99999994, 1.5, 2.0, 448.0, 3.4e38, 2.0**-126, 1e-3])
def test_power_of_two_is_the_largest_one_below(value):
    assert power_of_two(torch.tensor([value])).item() == 2.0 ** math.floor(math.log2(value))


@pytest.mark.parametrize("value", [0.0, 1e-45])
def test_power_of_two_stays_normal(value):
    assert power_of_two(torch.tensor([value])).item() == 2.0**-126


def test_exponents_are_biased_by_127():
    scale = torch.tensor([2.0**-126, 0.5, 1.0, 2.0, 2.0**127])
    assert to_e8m0(scale).tolist() == [1, 126, 127, 128, 254]
    assert torch.equal(from_e8m0(to_e8m0(scale)), scale)
    assert from_e8m0(torch.tensor([0], dtype=torch.uint8)).item() == 2.0**-127
    assert from_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan()
