# SPDX-License-Identifier: Apache-2.0
"""Static scales from a calibrated range, and what quantized linears compute, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import (
    FLOAT,
    QuantizationError,
    QuantizedLinear,
    QuantSpec,
    TensorRange,
    TensorSpec,
    Unit,
    UnitStatistics,
)
from modelslim_linear_quant.algorithm import LinearQuant
from modelslim_linear_quant.static import linear_scale as static_scale

NAME = "model.layers.3.mlp.experts.7.up_proj"
SYMMETRIC = TensorSpec("int8", "per_tensor")
ASYMMETRIC = TensorSpec("int8", "per_tensor", symmetric=False)


def observed(*batches: Tensor) -> TensorRange:
    statistic = TensorRange()
    for batch in batches:
        statistic.update(batch)
    return statistic


def batches(low: float, high: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three batches, of which the second holds the minimum and the third the maximum."""
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.rand(5, 8, generator=generator) * 0.5 + 0.25) * (high - low) + low for _ in range(3)]
    parts[1][2, 3], parts[2][4, 1] = low, high
    return [part.to(dtype) for part in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(-2.0, 3.5), (-7.25, 0.5), (1.0, 4.0), (-4.0, -1.0), (-1e-3, 1.7e-3)])
def test_static_scale_covers_the_range_of_all_batches(low: float, high: float, dtype: torch.dtype) -> None:
    seen = batches(low, high, dtype)
    values = torch.cat(seen).double()
    low, high = float(values.min()), float(values.max())

    scale, offset = static_scale(observed(*seen), SYMMETRIC, NAME)
    assert (scale.dtype, scale.shape, offset.dtype, offset.shape) == (torch.float32, (1,), torch.int8, (1,))
    assert float(scale) == pytest.approx(max(abs(low), abs(high)) / 127, rel=2**-22)
    assert int(offset) == 0

    scale, offset = static_scale(observed(*seen), ASYMMETRIC, NAME)
    low, high = min(low, 0.0), max(high, 0.0)
    assert float(scale) == pytest.approx((high - low) / 255, rel=2**-22)
    assert int(offset) == -128 - round(low / float(scale))
    codes = ((values / scale.double()).round() + offset).clamp(-128, 127)
    assert (((codes - offset) * scale.double() - values).abs() <= float(scale) * 0.5000001).all()


def test_static_scale_is_in_the_dtype_of_the_engine() -> None:
    statistic = observed(*batches(-2.0, 3.7))
    for spec in (SYMMETRIC, ASYMMETRIC):
        rounded = TensorSpec(spec.dtype, spec.scope, spec.symmetric, scale_dtype="bfloat16")
        scale, _ = static_scale(statistic, rounded, NAME)
        exact, _ = static_scale(statistic, spec, NAME)
        assert torch.equal(scale, scale.to(torch.bfloat16).float())
        above = float(scale) / float(exact) - 1  # an asymmetric scale is never rounded down
        assert (-(2**-8) if spec.symmetric else 0) <= above <= 2**-7


def test_input_that_is_always_zero_gets_a_scale() -> None:
    for spec in (SYMMETRIC, ASYMMETRIC):
        scale, offset = static_scale(observed(torch.zeros(4, 8)), spec, NAME)
        assert float(scale) > 0
        assert torch.isfinite(scale).all()
        assert int(offset) == (0 if spec.symmetric else -128)


def test_linear_that_no_token_reached_is_named() -> None:
    with pytest.raises(QuantizationError, match=r"experts\.7\.up_proj: no calibration token") as caught:
        static_scale(TensorRange(), SYMMETRIC, NAME)
    assert "per_token" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_input_that_is_not_finite_is_named_in_whatever_batch(value: float, position: int) -> None:
    seen = batches(-1.0, 1.0, torch.float16)
    seen[position][0, 0] = value
    with pytest.raises(QuantizationError, match=r"experts\.7\.up_proj: its input holds NaN") as caught:
        static_scale(observed(*seen), ASYMMETRIC, NAME)
    assert caught.value.hint


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(32, 24, bias=bias).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return module.to(dtype)


def quantize(module: nn.Linear, spec: QuantSpec, statistic: TensorRange | None = None) -> QuantizedLinear:
    algorithm = LinearQuant.from_config({"type": "linear_quant", "qconfig": {"weight": {}}})
    statistics = UnitStatistics({NAME: {TensorRange: statistic}} if statistic is not None else {})
    result = algorithm.apply(Unit("model.layers.3", {NAME: module}, {NAME: spec}), statistics)[NAME]
    assert isinstance(result, QuantizedLinear)
    assert result.spec == spec
    return result


def rounded_inputs(x: Tensor, spec: TensorSpec, low: float, high: float) -> Tensor:
    """The input after an integer round trip, one value at a time in double precision."""
    result = x.double().clone()
    for row in range(x.shape[0]):
        values = [float(value) for value in x[row]]
        if spec.scope == "per_token":
            low, high = min(values), max(values)
        if spec.symmetric:
            scale, offset = max(abs(low), abs(high)) / 127, 0
        else:
            scale = (max(high, 0.0) - min(low, 0.0)) / 255
            offset = -128 - round(min(low, 0.0) / scale)
        codes = [min(max(round(value / scale) + offset, -128), 127) for value in values]
        result[row] = torch.tensor([(code - offset) * scale for code in codes], dtype=torch.float64)
    return result


WEIGHTS = {
    "int8-channel": TensorSpec("int8", "per_channel"),
    "int8-channel-asymmetric": TensorSpec("int8", "per_channel", symmetric=False),
    "int8-group": TensorSpec("int8", "per_group", group_size=8),
    "int4-channel": TensorSpec("int4", "per_channel"),
    "int4-group-asymmetric": TensorSpec("int4", "per_group", symmetric=False, group_size=8),
}
ACTIVATIONS = {
    "static": SYMMETRIC,
    "static-asymmetric": ASYMMETRIC,
    "dynamic": TensorSpec("int8", "per_token"),
    "dynamic-asymmetric": TensorSpec("int8", "per_token", symmetric=False),
    "float": FLOAT,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_quantized_linear_computes_with_rounded_weights_and_inputs(weight: str, activation: str, bias: bool) -> None:
    spec = QuantSpec(WEIGHTS[weight], ACTIVATIONS[activation])
    module = linear(bias)
    seen = batches(-2.0, 3.0)
    result = quantize(module, spec, observed(*seen) if spec.is_static else None)
    assert (result.input_scale is not None) == spec.is_static

    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3)) * 1.3  # some beyond the calibrated range
    inputs = x.double() if spec.activation.is_float else rounded_inputs(x, spec.activation, -2.0, 3.0)
    expected = inputs @ result.weight.dequantize().double().t()
    if bias:
        expected += module.bias.double()
    torch.testing.assert_close(result(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_bias_is_a_copy_in_its_own_dtype() -> None:
    module = linear(dtype=torch.bfloat16)
    result = quantize(module, QuantSpec(WEIGHTS["int8-channel"], FLOAT))
    assert result.bias is not None
    assert result.bias.dtype == torch.bfloat16
    before = result.bias.clone()
    module.bias.zero_()
    assert torch.equal(result.bias, before)
