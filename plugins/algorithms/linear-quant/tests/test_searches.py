# SPDX-License-Identifier: Apache-2.0
"""ssz and mse against loops over single values in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import (
    FLOAT,
    ChannelEnergy,
    ExpertLinear,
    QuantizationError,
    QuantizedTensor,
    QuantSpec,
    TensorSpec,
    Unit,
    UnitStatistics,
)
from modelslim_linear_quant import mse, ssz
from modelslim_linear_quant.algorithm import LinearQuant
from modelslim_linear_quant.minmax import WeightRounder

SPECS = {
    f"{dtype}-{scope}-{'symmetric' if symmetric else 'asymmetric'}-{held}": TensorSpec(
        dtype, scope, symmetric, 16 if scope == "per_group" else None, held
    )
    for dtype in ("int8", "int4", "int3", "int2")
    for scope in ("per_channel", "per_group")
    for symmetric in (True, False)
    for held in ("float32", "bfloat16")
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> TensorSpec:
    return SPECS[request.param]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    """Rows of which some have outliers, some lie off centre, one is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.1
    weight[..., 0, :] = 0
    weight[..., 1, 3] = 2
    weight[..., 2, :] += 0.3
    weight[..., 3, :] = weight[..., 3, :].abs() * -1
    return weight


def energies(*shape: int, seed: int = 7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** 4 * 50


def group_errors(weight: Tensor, result: QuantizedTensor, energy: Tensor | None = None) -> Tensor:
    """Squared error of every row and group in double precision."""
    squares = (weight.double() - result.dequantize().double()) ** 2
    if energy is not None:
        squares = squares * energy.double()
    return squares.view(*result.scale.shape, -1).sum(-1)


def well_formed(weight: Tensor, result: QuantizedTensor) -> None:
    spec = result.spec
    assert result.codes.shape == weight.shape
    assert result.codes.is_contiguous()
    assert spec.qmin <= int(result.codes.min())
    assert int(result.codes.max()) <= spec.qmax
    assert (result.offset is None) == spec.symmetric
    assert torch.equal(result.scale.to(getattr(torch, spec.scale_dtype)).float(), result.scale)
    # Each code is the nearest one to its value.
    offset = 0 if result.offset is None else result.offset.double().unsqueeze(-1)
    values = weight.double().reshape(*result.scale.shape, -1) / result.scale.double().unsqueeze(-1) + offset
    off = result.codes.view(values.shape).double() - values.clamp(spec.qmin, spec.qmax)
    assert off.abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("known", [True, False])
def test_ssz_is_never_worse_than_the_whole_range(spec: TensorSpec, known: bool) -> None:
    for seed in range(4):
        weight, energy = random_weight(24, 64, seed=seed), energies(64, seed=seed) if known else None
        result = ssz.quantize(weight, spec, 50, energy)
        well_formed(weight, result)
        before = group_errors(weight, WeightRounder().quantize(weight, spec), energy)
        after = group_errors(weight, result, energy)
        assert (after <= before * (1 + 1e-4)).all()  # float32 cannot tell smaller differences
        assert spec.bits == 8 or after.sum() < before.sum() * 0.99


def fitted(values: list[float], counts: list[float], spec: TensorSpec, steps: int) -> float:
    """Least counted error that fitting scale and offset and rounding in turn reaches, for one row."""
    scale, offset = 0.0, 0
    if spec.symmetric:
        scale = max(map(abs, values)) / spec.qmax
    else:
        low, high = min([*values, 0.0]), max([*values, 0.0])
        scale = (high - low) / (spec.qmax - spec.qmin)
        offset = spec.qmin - round(low / scale)

    def codes() -> list[int]:
        """Without the offset."""
        return [min(max(round(value / scale), spec.qmin - offset), spec.qmax - offset) for value in values]

    def error() -> float:
        return sum(n * (v - code * scale) ** 2 for v, n, code in zip(values, counts, codes(), strict=True))

    least = error()
    for _ in range(steps):
        now = codes()
        rows = list(zip(values, counts, now, strict=True))
        scale = sum(n * v * c for v, n, c in rows) / sum(n * c * c for _, n, c in rows)
        if not spec.symmetric:
            shift = round(sum(n * (c - v / scale) for v, n, c in rows) / sum(counts))
            offset = min(max(offset + shift, spec.qmin), spec.qmax)
        if error() >= least:
            break
        least = error()
    return least


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("float32") and "channel" in name])
def test_ssz_reaches_what_the_loop_over_single_values_reaches(name: str, steps: int, known: bool) -> None:
    spec, weight, energy = SPECS[name], random_weight(24, 64), energies(64) if known else torch.ones(64)
    result = ssz.quantize(weight, spec, steps, energy if known else None)
    errors = group_errors(weight, result, energy).flatten()
    for row in range(1, 24):
        expected = fitted(weight[row].tolist(), energy.tolist(), spec, steps)
        assert float(errors[row]) == pytest.approx(expected, rel=1e-3), row


def shares(values: list[float], counts: list[float], spec: TensorSpec) -> Iterator[float]:
    """Error of every share of the range, in double precision."""
    for ratio in mse.ratios(spec):
        low, high = min(values) * ratio, max(values) * ratio
        if spec.symmetric:
            scale, offset = max(-low, high) / spec.qmax, 0
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / (spec.qmax - spec.qmin)
            offset = spec.qmin - round(low / scale)
        total = 0.0
        for value, count in zip(values, counts, strict=True):
            code = min(max(round(value / scale) + offset, spec.qmin), spec.qmax)
            total += count * (value - (code - offset) * scale) ** 2
        yield total


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("float32")])
def test_mse_finds_the_best_share_of_the_range(name: str, known: bool) -> None:
    spec = SPECS[name]
    weight, energy = random_weight(12, 32), energies(32)
    result = mse.quantize(weight, spec, energy if known else None)
    well_formed(weight, result)
    errors = group_errors(weight, result, energy if known else None)
    size = spec.group_size or 32
    for row in range(1, 12):
        for group in range(32 // size):
            part = slice(group * size, (group + 1) * size)
            counts = energy[part].tolist() if known else [1.0] * size
            least = min(shares(weight[row, part].tolist(), counts, spec))
            assert float(errors[row, group]) == pytest.approx(least, rel=1e-3), (row, group)


def test_mse_is_never_worse_than_the_whole_range(spec: TensorSpec) -> None:
    weight, energy = random_weight(24, 64), energies(64)
    for known in (energy, None):
        before = group_errors(weight, WeightRounder().quantize(weight, spec), known)
        after = group_errors(weight, mse.quantize(weight, spec, known), known)
        assert (after <= before * (1 + 1e-4)).all()


def test_row_of_zeros_stays_zero(spec: TensorSpec) -> None:
    weight = random_weight(8, 32)
    for result in (ssz.quantize(weight, spec, 50, energies(32)), mse.quantize(weight, spec, energies(32))):
        assert not result.dequantize()[0].any()


@pytest.mark.parametrize("method", ["ssz", "mse"])
def test_weight_of_many_blocks_and_views_is_quantized_row_by_row(method: str, spec: TensorSpec) -> None:
    base = torch.randn(6, 1 << 17, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight = base[:, ::2]
    energy = energies(1 << 16)

    def quantize(one: Tensor) -> QuantizedTensor:
        return ssz.quantize(one, spec, 4, energy) if method == "ssz" else mse.quantize(one, spec, energy)

    whole = quantize(weight)
    for row in range(0, 6, 2):
        part = quantize(weight[row : row + 1].float().contiguous())
        assert torch.equal(part.codes, whole.codes[row : row + 1])
        assert torch.equal(part.scale, whole.scale[row : row + 1])


@pytest.mark.parametrize("method", ["ssz", "mse"])
def test_experts_get_what_each_gets_alone(method: str, spec: TensorSpec) -> None:
    weight, energy = random_weight(3, 10, 32), energies(3, 32)
    whole = ssz.quantize(weight, spec, 50, energy) if method == "ssz" else mse.quantize(weight, spec, energy)
    for expert in range(3):
        one = weight[expert]
        own = energy[expert]
        alone = ssz.quantize(one, spec, 50, own) if method == "ssz" else mse.quantize(one, spec, own)
        assert torch.equal(whole.codes[expert], alone.codes)
        assert torch.equal(whole.scale[expert], alone.scale)
        assert whole.offset is None or (alone.offset is not None and torch.equal(whole.offset[expert], alone.offset))


def test_inputs_that_are_always_zero_leave_a_group_at_the_whole_range() -> None:
    """Whatever it is rounded to costs nothing."""
    spec, weight = TensorSpec("int4", "per_group", group_size=16), random_weight(8, 32)
    energy = torch.cat([torch.zeros(16), torch.ones(16)])
    plain = WeightRounder().quantize(weight, spec)
    for result in (ssz.quantize(weight, spec, 50, energy), mse.quantize(weight, spec, energy)):
        assert torch.equal(result.scale[:, 0], plain.scale[:, 0])
        assert not torch.equal(result.scale[:, 1], plain.scale[:, 1])


def observed(x: Tensor) -> ChannelEnergy:
    statistic = ChannelEnergy()
    statistic.update(x)
    return statistic


@pytest.mark.parametrize("method", ["ssz", "mse"])
def test_search_of_the_algorithm_minimizes_the_error_of_the_output(method: str) -> None:
    """With uncorrelated inputs, where the energies tell the whole error."""
    spec = TensorSpec("int4", "per_group", group_size=32)
    module = nn.Linear(64, 16, bias=False).requires_grad_(False)
    module.weight.copy_(random_weight(16, 64))
    x = torch.diag(energies(64) + 0.01)
    unit = Unit("unit", {"unit.q": module}, {"unit.q": QuantSpec(spec, FLOAT)})
    error = {}
    for wanted in ("output", "weight"):
        qconfig = {"weight": {"method": method, "ext": {"error": wanted}}}
        chosen = LinearQuant.from_config({"type": "linear_quant", "qconfig": qconfig})
        assert chosen.needs(unit) == ({"unit.q": frozenset({ChannelEnergy})} if wanted == "output" else {})
        statistics = UnitStatistics({"unit.q": {ChannelEnergy: observed(x)}} if wanted == "output" else {})
        result = chosen.apply(unit, statistics)["unit.q"]
        error[wanted] = float((result(x).double() - module(x).double()).square().sum())
    assert error["output"] < 0.95 * error["weight"]


@pytest.mark.parametrize("method", ["ssz", "mse"])
def test_search_among_experts_takes_the_inputs_of_each(method: str) -> None:
    spec = TensorSpec("int4", "per_channel")
    bank = ExpertLinear(3, 10, 32, {"down_proj": slice(None)})
    bank.weight.copy_(random_weight(3, 10, 32))
    energy = energies(3, 32)
    unit = Unit("unit", {"unit.down": bank}, {"unit.down": QuantSpec(spec, FLOAT)})
    ports = [{ChannelEnergy: observed(torch.diag(one.sqrt()))} for one in energy]
    chosen = LinearQuant.from_config({"type": "linear_quant", "qconfig": {"weight": {"method": method}}})
    result = chosen.apply(unit, UnitStatistics({}, {"unit.down": ports}))["unit.down"]
    seen = torch.stack(
        [port[ChannelEnergy].squares.float() for port in ports if port[ChannelEnergy].squares is not None]
    )
    alone = ssz.quantize(bank.weight, spec, 50, seen) if method == "ssz" else mse.quantize(bank.weight, spec, seen)
    assert torch.equal(result.codes, alone.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_not_finite_or_never_came_is_named(bad: float) -> None:
    module = nn.Linear(32, 4, bias=False).requires_grad_(False)
    unit = Unit("unit", {"unit.q": module}, {"unit.q": QuantSpec(TensorSpec("int4", "per_channel"), FLOAT)})
    chosen = LinearQuant.from_config({"type": "linear_quant", "qconfig": {"weight": {"method": "ssz"}}})
    x = torch.zeros(3, 32)
    x[1, 5] = bad
    with pytest.raises(QuantizationError, match=r"unit\.q: its input holds NaN or infinity"):
        chosen.apply(unit, UnitStatistics({"unit.q": {ChannelEnergy: observed(x)}}))
    with pytest.raises(QuantizationError, match=r"unit\.q: no calibration token reached it"):
        chosen.apply(unit, UnitStatistics({"unit.q": {ChannelEnergy: ChannelEnergy()}}))
