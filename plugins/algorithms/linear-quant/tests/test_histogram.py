# SPDX-License-Identifier: Apache-2.0
"""The counted values, and the clipping range against all ranges of a grid, in double precision."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from modelslim.api import QuantizationError, TensorRange, TensorSpec
from modelslim_linear_quant.histogram import Histogram
from modelslim_linear_quant.static import linear_scale

SYMMETRIC = TensorSpec("int8", "per_tensor")
ASYMMETRIC = TensorSpec("int8", "per_tensor", symmetric=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(x: Tensor, count: int, size: float) -> Tensor:
    flat = x.flatten().clone()
    flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(9))[:count]] *= size
    return flat.view(x.shape)


ACTIVATIONS = {
    "normal": random(64, 64),
    "heavy tails": random(64, 64) * random(64, 64, seed=1) ** 2,
    "some outliers": outliers(random(64, 64), 12, 40.0),
    "one massive": outliers(random(64, 64), 1, 3000.0),
    "after silu": torch.nn.functional.silu(random(64, 64) * 3),
    "off centre": random(64, 64) * 0.3 + 2,
    "positive": random(64, 64).abs() + 0.5,
    "negative": -random(64, 64).abs(),
    "outliers on one side": torch.where(random(64, 64, seed=2) > 3, 80.0, random(64, 64)),
    "few values": torch.tensor([[0.0, 1.0, 1.0, -3.0], [0.0, 0.0, 1.0, 1.0]]),
}


def observed(*batches: Tensor) -> Histogram:
    statistic = Histogram()
    for batch in batches:
        statistic.update(batch)
    return statistic


def grid_error(values: Tensor, scale: Tensor, offset: Tensor, spec: TensorSpec) -> Tensor:
    """Mean squared error of ``values`` float64 [n] for scales and offsets float64 [ranges]."""
    codes = ((values / scale[:, None]).round() + offset[:, None]).clamp(spec.qmin, spec.qmax)
    return ((codes - offset[:, None]) * scale[:, None] - values).square().mean(1)


def least_error(values: Tensor, spec: TensorSpec) -> float:
    """Of all ranges whose bounds are shares of the full ones."""
    ratios = torch.logspace(0, -4, 120, dtype=torch.float64)
    if spec.symmetric:
        scale = values.abs().amax() * ratios / 127
        return float(grid_error(values, scale, torch.zeros_like(scale), spec).min())
    high, low = values.amax().clamp(min=0) * ratios, values.amin().clamp(max=0) * ratios
    least = float("inf")
    for one in high:
        scale = ((one - low) / 255).clamp(min=1e-30)
        least = min(least, float(grid_error(values, scale, -128 - (low / scale).round(), spec).min()))
    return least


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_clipping_range_is_as_good_as_the_best_of_a_grid(name: str, spec: TensorSpec) -> None:
    x = ACTIVATIONS[name].to(torch.bfloat16)
    values = x.double().flatten()
    scale, offset = linear_scale(observed(x), spec, "linear")
    assert (scale.dtype, scale.shape, offset.dtype, offset.shape) == (torch.float32, (1,), torch.int8, (1,))
    error = float(grid_error(values, scale.double(), offset.double(), spec))
    assert error <= least_error(values, spec) * 1.02 + 1e-15

    whole = TensorRange()
    whole.update(x)
    plain = float(grid_error(values, *(part.double() for part in linear_scale(whole, spec, "linear")), spec))
    assert error <= plain * (1 + 1e-6)


def test_outliers_are_cut_off_where_that_pays() -> None:
    x = ACTIVATIONS["some outliers"]
    scale, _ = linear_scale(observed(x), SYMMETRIC, "linear")
    assert float(scale) < float(x.abs().max()) / 127


def test_scale_is_in_the_dtype_of_the_engine() -> None:
    spec = TensorSpec("int8", "per_tensor", scale_dtype="bfloat16")
    scale, _ = linear_scale(observed(ACTIVATIONS["normal"]), spec, "linear")
    assert torch.equal(scale, scale.to(torch.bfloat16).float())


def test_values_are_counted_one_by_one() -> None:
    x = torch.cat([random(40, 16) * 100, torch.zeros(1, 16), -torch.zeros(1, 16)]).to(torch.bfloat16)
    values, counts = observed(x[:7], x[7:30], x[30:30], x[30:]).values()
    expected = Counter(x.flatten().tolist())
    merged: Counter[float] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        merged[value] += count
    assert merged == expected
    assert (values[1:] >= values[:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_counted_to_three_digits(dtype: torch.dtype) -> None:
    x = random(50, 16).to(dtype)
    values, counts = observed(x).values()
    expected = x.to(torch.bfloat16).float().flatten().sort().values
    assert torch.equal(values.repeat_interleave(counts), expected)
    torch.testing.assert_close(expected, x.float().flatten().sort().values, rtol=2**-8, atol=0)


def test_instances_merge_and_batches_may_come_in_any_order() -> None:
    parts = [random(8, 16, seed=seed) for seed in range(4)]
    whole, one, other = observed(*parts), observed(parts[3], parts[1]), observed(parts[0], parts[2])
    one.merge(other)
    one.merge(Histogram())
    empty = Histogram()
    empty.merge(one)
    assert whole.counts is not None
    for merged in (one, empty):
        assert merged.counts is not None
        assert torch.equal(merged.counts, whole.counts)


def test_merged_counts_are_not_changed_by_later_batches_of_the_other() -> None:
    one, other = Histogram(), observed(random(4, 8))
    one.merge(other)
    other.update(random(4, 8, seed=1))
    assert one.counts is not None
    assert int(one.counts.sum()) == 32


def test_rescaling_of_channels_needs_a_pass_of_its_own() -> None:
    with pytest.raises(TypeError, match="Histogram does not follow"):
        observed(random(4, 8)).rescaled(torch.ones(8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_input_that_is_not_finite_is_named(bad: float) -> None:
    x = random(4, 8)
    x[2, 3] = bad
    with pytest.raises(QuantizationError, match=r"layer\.q: its input holds NaN or infinity"):
        linear_scale(observed(x), SYMMETRIC, "layer.q")


def test_linear_that_saw_no_token_is_named() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.q: no calibration token reached it"):
        linear_scale(observed(torch.zeros(0, 8)), SYMMETRIC, "layer.q")


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_input_that_is_always_zero_gets_a_scale(spec: TensorSpec) -> None:
    scale, _ = linear_scale(observed(torch.zeros(4, 8)), spec, "linear")
    assert float(scale) > 0
    assert scale.isfinite().all()
