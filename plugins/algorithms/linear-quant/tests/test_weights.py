# SPDX-License-Identifier: Apache-2.0
"""Rounded weights against a loop over single values in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import floor

import pytest
import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec
from modelslim_linear_quant.minmax import WeightRounder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = {
    f"{dtype}-{scope}-{'symmetric' if symmetric else 'asymmetric'}": TensorSpec(
        dtype, scope, symmetric, 16 if scope == "per_group" else None
    )
    for dtype in ("int8", "int4", "int3", "int2")
    for scope in ("per_channel", "per_group")
    for symmetric in (True, False)
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> TensorSpec:
    return SPECS[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def random(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02).to(dtype)


def groups_of(weight: Tensor, result: QuantizedTensor) -> Iterator[tuple[list[float], list[int], float, int]]:
    """Values, codes, scale and offset of every group, as Python numbers."""
    size = weight.shape[1] // result.scale.shape[1]
    for row in range(weight.shape[0]):
        for group in range(result.scale.shape[1]):
            part = slice(group * size, (group + 1) * size)
            offset = 0 if result.offset is None else int(result.offset[row, group])
            yield weight[row, part].tolist(), result.codes[row, part].tolist(), float(result.scale[row, group]), offset


def is_code(code: int, value: float, scale: float, offset: int, spec: TensorSpec) -> bool:
    """True for the nearest code, ties to even; for either neighbour where float32 cannot tell a tie."""
    quotient = value / scale
    near = abs(quotient - floor(quotient) - 0.5) <= 2**-22 * max(1.0, abs(quotient))
    allowed = {floor(quotient), floor(quotient) + 1} if near else {round(quotient)}
    return code in {min(max(nearest + offset, spec.qmin), spec.qmax) for nearest in allowed}


def check(weight: Tensor, spec: TensorSpec, result: QuantizedTensor) -> None:
    """Compare with the definition, one value at a time."""
    info = torch.finfo(getattr(torch, spec.scale_dtype))
    assert result.codes.dtype == torch.int8
    assert result.codes.shape == weight.shape
    assert result.scale.dtype == torch.float32
    assert result.scale.shape == (weight.shape[0], weight.shape[1] // (spec.group_size or weight.shape[1]))
    assert (result.offset is None) == spec.symmetric
    for values, codes, scale, offset in groups_of(weight, result):
        low, high = min(values), max(values)
        if spec.symmetric:
            exact = max(abs(low), abs(high)) / spec.qmax
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            exact = (high - low) / (spec.qmax - spec.qmin)
            assert is_code(offset, -low, scale, spec.qmin, spec)
        if spec.symmetric:
            assert abs(scale - exact) <= exact * (info.eps / 2 + 2**-22) or exact < scale == info.tiny
        else:  # rounded up, or 255 steps would end short of the range
            assert exact * (1 - 2**-22) <= scale <= exact * (1 + info.eps + 2**-22) or exact < scale == info.tiny
        for value, code in zip(values, codes, strict=True):
            assert is_code(code, value, scale, offset, spec), (value, code, scale, offset)
            assert abs(value - (code - offset) * scale) <= 0.5 * scale * (1 + 2**-15)


def test_codes_and_scales_are_those_of_double_precision(spec: TensorSpec, dtype: torch.dtype) -> None:
    weight = random(24, 64, dtype=dtype)
    check(weight, spec, WeightRounder().quantize(weight, spec))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_codes_are_made_for_the_scale_in_the_dtype_of_the_engine(scale_dtype: str, spec: TensorSpec) -> None:
    spec = TensorSpec(spec.dtype, spec.scope, spec.symmetric, spec.group_size, scale_dtype)
    weight = random(64, 64)
    result = WeightRounder().quantize(weight, spec)
    assert torch.equal(result.scale.to(getattr(torch, scale_dtype)).float(), result.scale)
    check(weight, spec, result)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_dequantized_weight_is_the_codes_times_the_scale(scale_dtype: str, spec: TensorSpec) -> None:
    spec = TensorSpec(spec.dtype, spec.scope, spec.symmetric, spec.group_size, scale_dtype)
    weight = random(8, 32)
    result = WeightRounder().quantize(weight, spec)
    expected = [(code - offset) * scale for _, codes, scale, offset in groups_of(weight, result) for code in codes]
    torch.testing.assert_close(result.dequantize().double().view(-1), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_largest_value_of_a_symmetric_row_gets_the_largest_code(scale_dtype: str, dtype: str) -> None:
    """However the scale is rounded: one code more would wrap around to the smallest."""
    spec = TensorSpec(dtype, "per_channel", scale_dtype=scale_dtype)
    largest = torch.linspace(1, 2, 100_001).unsqueeze(1)
    codes = WeightRounder().quantize(torch.cat([largest, -largest, largest / 2], dim=1), spec).codes
    assert torch.equal(codes[:, 0], torch.full((100_001,), spec.qmax, dtype=torch.int8))
    assert torch.equal(codes[:, 1], -codes[:, 0])


def test_half_precision_weights_are_rounded_as_their_values_in_float32(spec: TensorSpec, dtype: torch.dtype) -> None:
    weight = random(16, 64, dtype=dtype)
    same(WeightRounder().quantize(weight, spec), WeightRounder().quantize(weight.float(), spec))


def same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    assert (one.offset is None) == (other.offset is None)
    assert one.offset is None or other.offset is None or torch.equal(one.offset, other.offset)


ROWS: dict[str, tuple[torch.dtype, Callable[[], Tensor]]] = {
    "zeros": (torch.float32, lambda: torch.zeros(32)),
    "negative zeros": (torch.bfloat16, lambda: -torch.zeros(32)),
    "one positive value": (torch.float32, lambda: torch.full((32,), 0.37)),
    "one negative value": (torch.bfloat16, lambda: torch.full((32,), -0.37)),
    "one outlier": (torch.float32, lambda: torch.cat([torch.full((31,), 1e-6), torch.tensor([100.0])])),
    "subnormal in float32": (torch.float32, lambda: torch.linspace(-1e-40, 1e-40, 32)),
    "subnormal in float16": (torch.float16, lambda: torch.linspace(-6e-8, 6e-5, 32)),
    "subnormal in bfloat16": (torch.bfloat16, lambda: torch.linspace(-1e-39, 1e-39, 32)),
    "huge in float32": (torch.float32, lambda: torch.linspace(-1e30, 7e29, 32)),
    "huge in float16": (torch.float16, lambda: torch.linspace(-60000, 60000, 32)),
    "only positive": (torch.float32, lambda: torch.linspace(5.0, 6.0, 32)),
    "only negative": (torch.float32, lambda: torch.linspace(-6.0, -5.0, 32)),
    "exact ties": (torch.float32, lambda: torch.cat([torch.arange(31) * 0.5, torch.tensor([127.0])])),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("scale_dtype", ["float32", "dtype of the weight"])
def test_unusual_rows_are_rounded_by_the_same_rule(row: str, scale_dtype: str, spec: TensorSpec) -> None:
    dtype, make = ROWS[row]
    name = str(dtype).removeprefix("torch.") if scale_dtype == "dtype of the weight" else scale_dtype
    spec = TensorSpec(spec.dtype, spec.scope, spec.symmetric, spec.group_size, name)
    # Beside an ordinary row, which must not feel its neighbours.
    weight = torch.stack([random(1, 32)[0].to(dtype), make().to(dtype), random(1, 32, 1)[0].to(dtype)])
    result = WeightRounder().quantize(weight, spec)
    assert result.dequantize().isfinite().all()
    check(weight, spec, result)


def test_row_of_zeros_becomes_zeros(spec: TensorSpec) -> None:
    assert not WeightRounder().quantize(torch.zeros(4, 32), spec).dequantize().any()


def test_zero_is_represented_exactly(spec: TensorSpec) -> None:
    weight = random(16, 64) + 3
    weight[:, ::4] = 0
    assert not WeightRounder().quantize(weight, spec).dequantize()[:, ::4].any()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda base: base.t(),
    "every second column": lambda base: base[:, ::2],
    "every second row": lambda base: base[::2],
    "columns of a wider weight": lambda base: base[:, 16:48],
    "one expert of a fused weight": lambda base: base.view(4, 16, 64)[2],
    "one row for all": lambda base: base[:1].expand(8, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_view_of_a_weight_is_rounded_as_its_copy(view: str, spec: TensorSpec, dtype: torch.dtype) -> None:
    weight = VIEWS[view](random(64, 64, dtype=dtype))
    before = weight.clone()
    same(WeightRounder().quantize(weight, spec), WeightRounder().quantize(before.contiguous(), spec))
    assert torch.equal(weight, before)


def test_weight_of_many_blocks_is_rounded_row_by_row(spec: TensorSpec) -> None:
    weight = random(5, 1 << 19)
    whole = WeightRounder().quantize(weight, spec)
    for row in range(5):
        part = WeightRounder().quantize(weight[row : row + 1], spec)
        offset = None if whole.offset is None else whole.offset[row : row + 1]
        same(part, QuantizedTensor(whole.codes[row : row + 1], whole.scale[row : row + 1], offset, spec))


def test_rounder_that_has_seen_other_sizes_gives_what_a_fresh_one_gives(spec: TensorSpec) -> None:
    rounder = WeightRounder()
    shapes = [(8, 64), (4, 32), (32, 128), (8, 64)]
    weights = [random(rows, columns, seed) for seed, (rows, columns) in enumerate(shapes)]
    results = [rounder.quantize(weight, spec) for weight in weights]
    for weight, result in zip(weights, results, strict=True):
        same(result, WeightRounder().quantize(weight, spec))
