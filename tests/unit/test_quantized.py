# SPDX-License-Identifier: Apache-2.0
"""The waist: scales against exact arithmetic, the forward against brute force in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from modelslim import quantized as module
from modelslim.quantized import QuantizedLinear, QuantizedTensor, integer_matmul
from modelslim.scales import range_to_scale
from modelslim.types import FLOAT, QuantSpec, TensorSpec

CHANNEL, CHANNEL_ASYM = TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_channel", symmetric=False)
GROUP = TensorSpec("int8", "per_group", group_size=16)
GROUP_ASYM = TensorSpec("int8", "per_group", symmetric=False, group_size=16)
INT4 = TensorSpec("int4", "per_channel")
INT4_GROUP_ASYM = TensorSpec("int4", "per_group", symmetric=False, group_size=16)
STATIC, STATIC_ASYM = TensorSpec("int8", "per_tensor"), TensorSpec("int8", "per_tensor", symmetric=False)
TOKEN, TOKEN_ASYM = TensorSpec("int8", "per_token"), TensorSpec("int8", "per_token", symmetric=False)

WEIGHTS: Mapping[str, TensorSpec] = {
    "int8": CHANNEL,
    "int8-asymmetric": CHANNEL_ASYM,
    "int8-group": GROUP,
    "int8-group-asymmetric": GROUP_ASYM,
    "int4": INT4,
    "int4-group-asymmetric": INT4_GROUP_ASYM,
}
ACTIVATIONS: Mapping[str, TensorSpec] = {
    "static": STATIC,
    "static-asymmetric": STATIC_ASYM,
    "token": TOKEN,
    "token-asymmetric": TOKEN_ASYM,
}
ROWS, COLUMNS, TOKENS = 24, 64, 9
INPUT_SCALE, INPUT_OFFSET = 0.0231, -37


def make(weight: TensorSpec, activation: TensorSpec = FLOAT, bias: bool = True, seed: int = 0) -> QuantizedLinear:
    """A linear of random codes: nothing of it was computed by the code under test."""
    generator = torch.Generator().manual_seed(seed)
    groups = COLUMNS // (weight.group_size or COLUMNS)
    codes = torch.randint(weight.qmin, weight.qmax + 1, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    scale = torch.rand(ROWS, groups, generator=generator) * 0.01 + 0.001
    offset = None
    if not weight.symmetric:
        offset = torch.randint(weight.qmin, weight.qmax + 1, (ROWS, groups), generator=generator, dtype=torch.int8)
    static = activation.scope == "per_tensor" and not activation.is_float
    return QuantizedLinear(
        QuantizedTensor(codes, scale, offset, weight),
        QuantSpec(weight, activation),
        torch.randn(ROWS, generator=generator) if bias else None,
        torch.tensor([INPUT_SCALE]) if static else None,
        torch.tensor([0 if activation.symmetric else INPUT_OFFSET], dtype=torch.int8) if static else None,
    )


def tokens(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 1, TOKENS).unsqueeze(1)  # tokens of very different size
    return torch.randn(TOKENS, COLUMNS, generator=generator) * scales + 0.2 * scales


def weight64(linear: QuantizedLinear) -> list[list[float]]:
    """The weight, number by number."""
    weight = linear.weight
    size = COLUMNS // weight.scale.shape[1]
    return [
        [
            (int(weight.codes[row, column]) - (0 if weight.offset is None else int(weight.offset[row, column // size])))
            * float(weight.scale[row, column // size])
            for column in range(COLUMNS)
        ]
        for row in range(ROWS)
    ]


def input64(row: list[float], spec: TensorSpec) -> list[float]:
    """A token after quantization and back, in exact arithmetic but for the scale, which is a float32."""
    if spec.scope == "per_tensor":
        scale = float(torch.tensor(INPUT_SCALE))
        offset = 0 if spec.symmetric else INPUT_OFFSET
    elif spec.symmetric:
        scale, offset = float(torch.tensor(max(abs(value) for value in row)) / 127), 0
    else:
        low, high = min(*row, 0.0), max(*row, 0.0)
        scale = float((torch.tensor(high) - torch.tensor(low)) / 255)
        offset = -128 - round(low / scale)
    result = []
    for value in row:
        quotient = value / scale
        assert abs(abs(quotient % 1) - 0.5) > 1e-5, "the test's data must not sit on a tie"
        result.append((min(max(round(quotient) + offset, -128), 127) - offset) * scale)
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_forward_with_quantized_activations_equals_brute_force(weight: str, activation: str, bias: bool) -> None:
    linear = make(WEIGHTS[weight], ACTIVATIONS[activation], bias)
    x = tokens()
    w = torch.tensor(weight64(linear), dtype=torch.float64)
    quantized = torch.tensor([input64(row, ACTIVATIONS[activation]) for row in x.tolist()], dtype=torch.float64)
    expected = quantized @ w.t()
    size = quantized.abs() @ w.abs().t()
    if linear.bias is not None:
        expected += linear.bias.double()
        size += linear.bias.double().abs()
    y = linear(x)
    assert y.dtype == torch.float32 and y.shape == (TOKENS, ROWS)
    assert ((y.double() - expected).abs() <= 1e-6 * size + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_keeps_the_dtype_and_computes_wider(activation: str, dtype: torch.dtype) -> None:
    linear = make(CHANNEL, ACTIVATIONS[activation])
    linear.bias = torch.randn(ROWS).to(dtype)
    x = (tokens() * 0.1).to(dtype)
    y, wide = linear(x), linear(x.float())
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))  # one rounding, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_forward_with_float_activations_equals_brute_force(weight: str, dtype: torch.dtype) -> None:
    linear = make(WEIGHTS[weight])
    x = (tokens() * 0.1).to(dtype)
    w = torch.tensor(weight64(linear), dtype=torch.float64)
    assert linear.bias is not None
    expected = x.double() @ w.t() + linear.bias.double()
    size = x.double().abs() @ w.abs().t() + linear.bias.double().abs()
    y = linear(x)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_dequantize_equals_the_formula_number_by_number(weight: str) -> None:
    linear = make(WEIGHTS[weight])
    dequantized = linear.weight.dequantize()
    assert dequantized.dtype == torch.float32 and dequantized.shape == (ROWS, COLUMNS)
    expected = torch.tensor(weight64(linear), dtype=torch.float64)
    assert torch.equal(dequantized, expected.to(torch.float32))  # one product of exact numbers


@pytest.mark.parametrize("activation", ["token", "token-asymmetric"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_outlier_token_leaves_the_other_tokens_alone(weight: str, activation: str) -> None:
    linear = make(WEIGHTS[weight], ACTIVATIONS[activation])
    x = tokens()
    y = linear(x)
    x[4] *= 1000
    changed = linear(x)
    others = [index for index in range(TOKENS) if index != 4]
    assert torch.equal(changed[others], y[others])
    assert not torch.equal(changed[4], y[4])


@pytest.mark.parametrize("activation", ["static", "static-asymmetric"])
def test_static_activations_beyond_the_calibrated_range_are_clipped(activation: str) -> None:
    linear = make(CHANNEL, ACTIVATIONS[activation], bias=False)
    far, further = torch.full((1, COLUMNS), 1e3), torch.full((1, COLUMNS), 1e6)
    assert torch.equal(linear(far), linear(further))
    assert torch.equal(linear(-far), linear(-further))
    assert not torch.equal(linear(far), linear(-far))


def test_leading_dimensions_are_kept() -> None:
    linear = make(CHANNEL, TOKEN)
    x = tokens()[:6]
    flat = linear(x)
    assert torch.equal(linear(x.reshape(2, 3, COLUMNS)), flat.reshape(2, 3, ROWS))
    assert torch.equal(linear(x[0]), flat[0])


@pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), FLOAT], ids=str)
def test_no_tokens_give_no_outputs(activation: TensorSpec) -> None:
    """An expert that no token was sent to."""
    for weight in WEIGHTS.values():
        assert make(weight, activation)(tokens()[:0]).shape == (0, ROWS)
        assert make(weight, activation)(torch.empty(2, 0, COLUMNS)).shape == (2, 0, ROWS)


def test_rows_of_zeros_stay_zero() -> None:
    for activation in ACTIVATIONS.values():
        linear = make(CHANNEL, activation, bias=False)
        assert torch.equal(linear(torch.zeros(2, COLUMNS)), torch.zeros(2, ROWS))


def test_static_parameters_come_with_static_activations_only() -> None:
    weight = make(CHANNEL).weight
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int8)
    for activation, scale, offset in (
        (STATIC, None, None),
        (STATIC, one, None),
        (TOKEN, one, zero),
        (FLOAT, one, zero),
    ):
        with pytest.raises(ValueError, match="static"):
            QuantizedLinear(weight, QuantSpec(CHANNEL, activation), None, scale, offset)


def test_a_linear_tells_its_size_and_scheme() -> None:
    linear = make(INT4, TOKEN)
    assert (linear.in_features, linear.out_features) == (COLUMNS, ROWS)
    assert linear.extra_repr() == "in_features=64, out_features=24, scheme=W4A8_DYNAMIC"
    assert not list(linear.parameters())


@pytest.mark.parametrize(
    ("weight", "activation", "scheme"),
    [
        (CHANNEL, STATIC, "W8A8"),
        (CHANNEL, TOKEN_ASYM, "W8A8_DYNAMIC"),
        (CHANNEL, FLOAT, "W8A16"),
        (INT4, TOKEN, "W4A8_DYNAMIC"),
        (INT4_GROUP_ASYM, FLOAT, "W4A16"),
    ],
)
def test_schemes_have_the_names_of_the_field(weight: TensorSpec, activation: TensorSpec, scheme: str) -> None:
    spec = QuantSpec(weight, activation)
    assert spec.scheme == scheme
    assert (spec.is_static, spec.is_dynamic) == (
        activation.scope == "per_tensor" and activation != FLOAT,
        activation.scope == "per_token",
    )


# Scales

EXTREMES = (0.0, 1.0, -1.0, 3.0e4, -3.0e4, 1e-3, 6.1e-5, 1e-7, 127.0, -128.0, 0.1)
UNIT_ROUNDOFF = {"float32": Fraction(1, 2**24), "bfloat16": Fraction(1, 2**8), "float16": Fraction(1, 2**11)}
RANGE_SPECS = [
    TensorSpec(dtype, "per_channel", symmetric, None, scale_dtype)
    for dtype in ("int8", "int4")
    for symmetric in (True, False)
    for scale_dtype in UNIT_ROUNDOFF
]


def ranges() -> tuple[Tensor, Tensor]:
    pairs = [(low, high) for low, high in itertools.product(EXTREMES, EXTREMES) if low <= high]
    spread = torch.randn(400, 2, generator=torch.Generator().manual_seed(2)).sort(1).values
    spread *= torch.logspace(-4, 4, 400).unsqueeze(1)
    both = torch.cat([torch.tensor(pairs), spread])
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def exact_scale(low: float, high: float, spec: TensorSpec) -> Fraction:
    if spec.symmetric:
        return max(abs(Fraction(low)), abs(Fraction(high))) / spec.qmax
    return (max(Fraction(high), Fraction()) - min(Fraction(low), Fraction())) / (spec.qmax - spec.qmin)


@pytest.mark.parametrize("spec", RANGE_SPECS, ids=str)
def test_scales_equal_exact_arithmetic_up_to_the_rounding_of_their_dtype(spec: TensorSpec) -> None:
    low, high = ranges()
    scale, _ = range_to_scale(low, high, spec)
    dtype = getattr(torch, spec.scale_dtype)
    assert scale.dtype == torch.float32 and scale.shape == low.shape
    assert torch.equal(scale, scale.to(dtype).to(torch.float32)), "the engine can hold it as it is"
    tiny = Fraction(torch.finfo(dtype).tiny)
    for a, b, s in zip(low.tolist(), high.tolist(), scale.tolist(), strict=True):
        exact = exact_scale(a, b, spec)
        if exact < tiny:
            assert Fraction(s) == tiny
        elif spec.symmetric:
            assert abs(Fraction(s) - exact) <= exact * (UNIT_ROUNDOFF[spec.scale_dtype] + Fraction(1, 2**22))
        else:  # never rounded down, or the codes would end short of the range
            tolerance = Fraction(1, 2**22)
            assert -tolerance <= Fraction(s) / exact - 1 <= 2 * UNIT_ROUNDOFF[spec.scale_dtype] + tolerance


@pytest.mark.parametrize("spec", RANGE_SPECS, ids=str)
def test_the_ends_of_a_range_and_zero_fit_into_the_codes(spec: TensorSpec) -> None:
    low, high = ranges()
    scale, offset = range_to_scale(low, high, spec)
    assert (offset is None) == spec.symmetric
    if offset is not None:
        assert offset.dtype == torch.int8 and offset.shape == low.shape
    offsets = [0] * len(low) if offset is None else offset.tolist()
    # Half a code, and in a symmetric range what the scale lost when it was rounded, over all codes.
    lost = (spec.qmax - spec.qmin) * UNIT_ROUNDOFF[spec.scale_dtype] if spec.symmetric else 0
    slack = Fraction(1, 2) + lost + Fraction(1, 1000)
    for a, b, s, o in zip(low.tolist(), high.tolist(), scale.tolist(), offsets, strict=True):
        assert spec.qmin <= o <= spec.qmax
        for value in (a, b, 0.0):
            code = round(Fraction(value) / Fraction(s)) + o
            if spec.symmetric:
                assert spec.qmin <= code <= spec.qmax
            code = min(max(code, spec.qmin), spec.qmax)
            assert abs((code - o) * Fraction(s) - Fraction(value)) <= slack * Fraction(s)
        assert spec.qmin <= 0 + o <= spec.qmax  # zero is a code of its own


def test_offsets_equal_exact_arithmetic() -> None:
    spec = TensorSpec("int8", "per_tensor", symmetric=False)
    low, high = ranges()
    scale, offset = range_to_scale(low, high, spec)
    assert offset is not None
    for a, s, o in zip(low.tolist(), scale.tolist(), offset.tolist(), strict=True):
        quotient = min(Fraction(a), Fraction()) / Fraction(s)
        if abs(abs(quotient - round(quotient)) - Fraction(1, 2)) > Fraction(1, 10**4):  # not a tie
            assert o == min(max(-128 - round(quotient), -128), 127)


@pytest.mark.parametrize("spec", RANGE_SPECS, ids=str)
def test_rows_of_zeros_have_a_scale_that_survives_division(spec: TensorSpec) -> None:
    scale, offset = range_to_scale(torch.zeros(3), torch.zeros(3), spec)
    assert (scale > 0).all() and torch.isfinite(1 / scale).all()
    if offset is not None:
        assert offset.tolist() == [spec.qmin] * 3  # any offset will do: (0 + offset - offset) * scale is 0
    assert (torch.zeros(3) / scale).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_symmetric_codes_are_within_range_without_clamping(dtype: str, scale_dtype: str) -> None:
    """Also when rounding made the scale smaller: weights are rounded without a clamp."""
    spec = TensorSpec(dtype, "per_channel", scale_dtype=scale_dtype)
    high = torch.cat([torch.linspace(0.5, 1, 5001), torch.tensor([1e-37, 1e-38, 3e38])])
    scale, _ = range_to_scale(-high, high, spec)
    codes = (high / scale).round()
    assert codes.max() <= spec.qmax
    assert codes[:5001].min() >= spec.qmax - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranges_may_be_of_any_floating_dtype(dtype: torch.dtype) -> None:
    low, high = torch.tensor([-1.5, -0.25], dtype=dtype), torch.tensor([0.5, 4.0], dtype=dtype)
    for spec in (CHANNEL, CHANNEL_ASYM):
        ours, wide = range_to_scale(low, high, spec), range_to_scale(low.float(), high.float(), spec)
        assert torch.equal(ours[0], wide[0])


# Integer products


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (1, 7, 3), (5, 33, 2), (17, 64, 24), (40, 1000, 9)])
def test_integer_products_equal_those_of_int64(
    rows: int, inner: int, columns: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(module, "has_integer_matmul", lambda *_: False)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, inner), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (columns, inner), generator=generator, dtype=torch.int8)
    expected = (x.long().unsqueeze(1) * weight.long()).sum(-1)
    assert torch.equal(integer_matmul(x, weight), expected.to(torch.float32))


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("sign", [127, -128])
def test_the_largest_integer_products_do_not_overflow(
    sign: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(module, "has_integer_matmul", lambda *_: False)
    inner = 65536
    x = torch.full((2, inner), sign, dtype=torch.int8)
    weight = torch.full((3, inner), -128, dtype=torch.int8)
    expected = torch.full((2, 3), sign * -128 * inner, dtype=torch.int64)
    assert torch.equal(integer_matmul(x, weight), expected.to(torch.float32))


def test_integer_products_have_shapes_on_meta_and_without_tokens() -> None:
    weight = torch.ones(3, 8, dtype=torch.int8)
    assert integer_matmul(torch.ones(5, 8, dtype=torch.int8, device="meta"), weight.to("meta")).shape == (5, 3)
    assert integer_matmul(torch.ones(0, 8, dtype=torch.int8), weight).shape == (0, 3)
