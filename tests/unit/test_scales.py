# SPDX-License-Identifier: Apache-2.0
"""Scales and codes of floating dtypes against brute force over the grid of their values, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.scales import largest_magnitudes, range_to_scale, rounded_inputs, spread, to_codes, whole_scale
from modelslim.types import FLOAT, QuantSpec, TensorSpec

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)

FP8_TOKEN = TensorSpec("fp8_e4m3", "per_token")
FP8_BLOCK = TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128)
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)
NVFP4 = TensorSpec("nvfp4", "per_block", group_size=16)


def quantize(weight: torch.Tensor, spec: TensorSpec) -> QuantizedTensor:
    """Round to nearest with the functions under test."""
    absmax = largest_magnitudes(weight, spec)
    whole = whole_scale(absmax.amax()).view(1) if spec.dtype == "nvfp4" else None
    scale, _ = range_to_scale(-absmax, absmax, spec, whole)
    return QuantizedTensor(to_codes(weight / spread(scale, weight.shape, spec), spec), scale, None, spec, whole)


def on_grid(values: torch.Tensor, scale: float, grid: torch.Tensor) -> torch.Tensor:
    """Each value's nearest multiple of the scale that the grid has."""
    exact = values.to(torch.float64) / scale
    index = (exact.abs().unsqueeze(-1) - grid).abs().argmin(-1)
    return torch.copysign(grid[index], exact) * scale


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(1)
    spread_out = torch.randn(160, 192, generator=generator) * torch.rand(160, 1, generator=generator)
    spread_out[3] = 0
    return spread_out


@pytest.mark.parametrize(("spec", "grid", "top"), [(MXFP8, E4M3, 8), (MXFP4, E2M1, 2)])
def test_microscaling_blocks_are_on_the_grid_of_a_power_of_two(weight, spec, grid, top):
    result = quantize(weight, spec)
    assert result.scale.shape == (160, 6)
    back = result.dequantize()
    for row in range(0, 160, 13):
        for block in range(6):
            values = weight[row, 32 * block : 32 * block + 32]
            size = float(values.abs().max())
            exponent = math.floor(math.log2(size))
            if spec.dtype == "mxfp4" and size / 2.0**exponent >= 1.75:
                exponent += 1
            scale = 2.0 ** (exponent - top)
            assert result.scale[row, block] == scale
            expected = on_grid(values, scale, grid)
            # Of two at one distance either will do; there is none in random numbers.
            assert torch.equal(back[row, 32 * block : 32 * block + 32].to(torch.float64), expected)


def test_zeros_stay_zero(weight):
    for spec in (MXFP8, MXFP4, NVFP4, FP8_BLOCK):
        assert not quantize(weight, spec).dequantize()[3].any()
        assert not quantize(torch.zeros(128, 128), spec).dequantize().any()


def test_nvfp4_scales_are_float8_numbers_times_that_of_the_whole(weight):
    result = quantize(weight, NVFP4)
    whole = float(weight.abs().max()) / (448 * 6)
    assert result.whole_scale.item() == pytest.approx(whole, rel=1e-6)
    share = (result.scale / result.whole_scale).to(torch.float64)
    assert ((share.unsqueeze(-1) - E4M3).abs().amin(-1) <= share * 1e-6).all()
    back = result.dequantize()
    for row in (0, 7, 159):
        values = weight[row, :16]
        expected = on_grid(values, float(result.scale[row, 0]), E2M1)
        assert torch.allclose(back[row, :16].to(torch.float64), expected, rtol=1e-6, atol=0)


def test_float8_in_blocks_has_a_scale_for_rows_and_columns_together(weight):
    result = quantize(weight, FP8_BLOCK)
    assert result.scale.shape == (2, 2)
    assert result.codes.dtype == torch.float8_e4m3fn
    back = result.dequantize().to(torch.float64)
    for rows in (slice(0, 128), slice(128, 160)):
        for columns in (slice(0, 128), slice(128, 192)):
            values = weight[rows, columns]
            scale = float((values.abs().max() / 448).to(torch.float32))
            assert torch.allclose(back[rows, columns], on_grid(values, scale, E4M3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [FP8_TOKEN, MXFP8, MXFP4, TensorSpec("int4", "per_token")])
def test_inputs_are_rounded_as_a_weight_of_the_same_numbers_is(weight, spec):
    spec_of_weight = TensorSpec(spec.dtype, "per_channel") if spec.scope == "per_token" else spec
    assert torch.equal(rounded_inputs(weight, spec), quantize(weight, spec_of_weight).dequantize())


def test_static_float8_inputs_take_the_scale_of_calibration(weight):
    spec = TensorSpec("fp8_e4m3", "per_tensor")
    scale = torch.tensor([0.004])
    expected = on_grid(weight, 0.004, E4M3)  # 448 * 0.004 is less than the largest: it is cut off
    rounded = rounded_inputs(weight, spec, scale, torch.zeros(1, dtype=torch.int8)).to(torch.float64)
    assert torch.allclose(rounded, expected, rtol=1e-6, atol=0)


def test_one_token_of_pd_mix_is_static_and_several_are_dynamic(weight):
    spec = TensorSpec("int8", "pd_mix", symmetric=False)
    scale, offset = range_to_scale(weight.amin().view(1), weight.amax().view(1), spec)
    one = rounded_inputs(weight[:1], spec, scale, offset)
    static = TensorSpec("int8", "per_tensor", symmetric=False)
    assert torch.equal(one, rounded_inputs(weight[:1], static, scale, offset))
    several = rounded_inputs(weight[:2], spec, scale, offset)
    assert torch.equal(several, rounded_inputs(weight[:2], TensorSpec("int8", "per_token")))


@pytest.mark.parametrize("activation", [FLOAT, FP8_TOKEN, MXFP8, MXFP4])
@pytest.mark.parametrize("spec", [MXFP8, MXFP4, FP8_BLOCK, TensorSpec("fp8_e4m3", "per_channel")])
def test_a_linear_multiplies_what_rounding_left(weight, spec, activation):
    linear = QuantizedLinear(quantize(weight, spec), QuantSpec(spec, activation), bias=torch.ones(160))
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    expected = rounded_inputs(x, activation).double() @ quantize(weight, spec).dequantize().double().t() + 1
    assert torch.allclose(linear(x).double(), expected, atol=1e-4)


def test_rows_of_an_expert_are_those_of_whole_blocks():
    weight = torch.randn(2, 300, 128)
    spec = FP8_BLOCK
    scale, _ = range_to_scale(-largest_magnitudes(weight, spec), largest_magnitudes(weight, spec), spec)
    codes = to_codes(weight / spread(scale, weight.shape, spec), spec)
    experts = QuantizedExperts(QuantizedTensor(codes, scale, None, spec), QuantSpec(spec))
    whole = experts.weight.dequantize()
    assert torch.equal(experts.linear(1, slice(128, 300)).weight.dequantize(), whole[1, 128:300])
    with pytest.raises(ValueError, match="not whole blocks of 128"):
        experts.linear(1, slice(100, 300))


@pytest.mark.parametrize(
    ("weight_spec", "activation", "scheme"),
    [
        (TensorSpec("fp8_e4m3", "per_channel"), FP8_TOKEN, "W8A8FP8_DYNAMIC"),
        (TensorSpec("fp8_e4m3", "per_channel"), TensorSpec("fp8_e4m3", "per_tensor"), "W8A8FP8"),
        (TensorSpec("fp8_e4m3", "per_channel"), FLOAT, "W8A16FP8"),
        (TensorSpec("int4", "per_channel"), FP8_TOKEN, "W4A8FP8_DYNAMIC"),
        (MXFP8, MXFP8, "W8A8_MXFP8"),
        (MXFP4, MXFP8, "W4A8_MXFP"),
        (MXFP4, MXFP4, "W4A4_MXFP4"),
        (MXFP4, FLOAT, "W4A16_MXFP4"),
        (NVFP4, NVFP4, "W4A4_NVFP4"),
        (TensorSpec("int4", "per_channel"), TensorSpec("int4", "per_token"), "W4A4_DYNAMIC"),
        (TensorSpec("int8", "per_channel"), TensorSpec("int8", "pd_mix", symmetric=False), "W8A8_MIX"),
    ],
)
def test_names_of_schemes(weight_spec, activation, scheme):
    assert QuantSpec(weight_spec, activation).scheme == scheme
