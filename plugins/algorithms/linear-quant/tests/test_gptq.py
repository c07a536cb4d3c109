# SPDX-License-Identifier: Apache-2.0
"""gptq against optimal brain quantization column by column, with an explicit inverse in double precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import (
    FLOAT,
    ExpertLinear,
    Gram,
    QuantizationError,
    QuantizedTensor,
    QuantSpec,
    TensorSpec,
    Unit,
    UnitStatistics,
)
from modelslim_linear_quant import gptq
from modelslim_linear_quant.algorithm import LinearQuant
from modelslim_linear_quant.config import WeightMethod
from modelslim_linear_quant.minmax import WeightRounder
from modelslim_linear_quant.mse import best_scales

METHOD = WeightMethod("gptq")
SPECS = {
    f"{dtype}-{scope}-{'symmetric' if symmetric else 'asymmetric'}": TensorSpec(
        dtype, scope, symmetric, 16 if scope == "per_group" else None
    )
    for dtype in ("int8", "int4", "int3", "int2")
    for scope in ("per_channel", "per_group")
    for symmetric in (True, False)
}
INT4 = SPECS["int4-per_channel-symmetric"]
INT4_GROUPS = SPECS["int4-per_group-asymmetric"]


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> TensorSpec:
    return SPECS[request.param]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def inputs(columns: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Correlated activations, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]


def gram(columns: int, seed: int = 1) -> Tensor:
    x = inputs(columns, seed=seed)
    return x.t() @ x


def quantize(weight: Tensor, hessian: Tensor, spec: TensorSpec, method: WeightMethod = METHOD) -> QuantizedTensor:
    return gptq.quantize(weight, gptq.factorize(hessian, method), spec, method)


def reference(weight: Tensor, hessian: Tensor, result: QuantizedTensor, method: WeightMethod) -> Tensor:
    """Codes of optimal brain quantization, one column at a time, with the scales of ``result``."""
    columns = weight.shape[1]
    energy = hessian.double().diagonal()
    order = sorted(range(columns), key=lambda column: -float(energy[column])) if method.act_order else range(columns)
    inverse = torch.linalg.inv(hessian.double() + torch.eye(columns) * energy.mean() * method.percdamp)
    values, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int8)
    size = columns // result.scale.shape[1]
    for column in order:
        scale = result.scale[:, column // size].double()
        offset = 0 if result.offset is None else result.offset[:, column // size].double()
        code = ((values[:, column] / scale).round() + offset).clamp(result.spec.qmin, result.spec.qmax)
        codes[:, column] = code.to(torch.int8)
        error = (values[:, column] - (code - offset) * scale) / inverse[column, column]
        values -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done with; its row and column are zero
    return codes


def loss(weight: Tensor, result: QuantizedTensor, hessian: Tensor) -> float:
    """Squared error of the output, summed over tokens and outputs."""
    error = (weight.double() - result.dequantize().double()).reshape(-1, weight.shape[-1])
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("block_size", [1, 7, 48, 128])
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_optimal_brain_quantization(spec: TensorSpec, act_order: bool, block_size: int) -> None:
    weight, hessian = random_weight(20, 48), gram(48)
    method = replace(METHOD, act_order=act_order, block_size=block_size)
    result = quantize(weight, hessian, spec, method)
    assert torch.equal(result.codes, reference(weight, hessian, result, method))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("span", ["mse", "minmax"])
def test_error_of_the_output_is_lower_than_that_of_rounding_to_nearest(
    spec: TensorSpec, act_order: bool, span: str
) -> None:
    for seed in range(3):
        weight, hessian = random_weight(32, 96, seed=seed), gram(96, seed + 10)
        result = quantize(weight, hessian, spec, replace(METHOD, act_order=act_order, range=span))
        assert loss(weight, result, hessian) < 0.8 * loss(weight, WeightRounder().quantize(weight, spec), hessian)


def test_scales_are_those_of_the_weight_as_it_is(spec: TensorSpec) -> None:
    weight, hessian = random_weight(12, 48), gram(48)
    for method in (METHOD, replace(METHOD, act_order=False)):
        result = quantize(weight, hessian, spec, method)
        scale, offset = best_scales(weight, spec, hessian.diagonal())
        assert torch.equal(result.scale, scale)
        assert (result.offset is None) == (offset is None)
        assert result.offset is None or offset is None or torch.equal(result.offset, offset)
    full = quantize(weight, hessian, spec, replace(METHOD, range="minmax"))
    assert torch.equal(full.scale, WeightRounder().quantize(weight, spec).scale)


def test_uncorrelated_inputs_give_rounding_to_nearest(spec: TensorSpec) -> None:
    weight = random_weight(16, 48)
    result = quantize(weight, torch.linspace(1, 9, 48).diag(), spec, replace(METHOD, range="minmax"))
    same(result, WeightRounder().quantize(weight, spec))


def test_half_precision_weights_are_rounded_as_their_values_in_float32(spec: TensorSpec) -> None:
    weight, hessian = random_weight(16, 48).to(torch.bfloat16), gram(48)
    same(quantize(weight, hessian, spec), quantize(weight.float(), hessian, spec))


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_disturb_nobody(spec: TensorSpec) -> None:
    weight, hessian = random_weight(16, 48), gram(48)
    hessian[5], hessian[:, 5] = 0, 0
    method = replace(METHOD, range="minmax")
    result = quantize(weight, hessian, spec, method)
    assert torch.equal(result.codes[:, 5], WeightRounder().quantize(weight, spec).codes[:, 5])
    assert torch.equal(result.codes, reference(weight, hessian, result, method))
    nothing = quantize(weight, torch.zeros(48, 48), spec, method)
    same(nothing, WeightRounder().quantize(weight, spec))


def one_token() -> Tensor:
    """A Hessian of rank one."""
    row = torch.randn(48, generator=torch.Generator().manual_seed(3)) * 100
    return torch.outer(row, row)


def test_damping_grows_until_there_is_a_decomposition_and_says_so() -> None:
    method, weight, hessian = replace(METHOD, percdamp=1e-12), random_weight(8, 48), one_token()
    factor = gptq.factorize(hessian, method)
    assert 1e-11 <= float(factor.percdamp) <= 1e-4  # float32 cannot tell 1e-8 of the diagonal from nothing
    (note,) = gptq.notes(factor.percdamp, method)
    assert note.startswith("percdamp was raised from 1e-12 to 1e-")
    result = gptq.quantize(weight, factor, INT4, method)
    assert result.scale.isfinite().all()
    assert loss(weight, result, hessian) < loss(weight, WeightRounder().quantize(weight, INT4), hessian)
    assert gptq.notes(gptq.factorize(gram(48), METHOD).percdamp, METHOD) == ()


def test_raised_damping_is_told_of_the_linear_and_of_the_experts() -> None:
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(3)) * 100
    chosen = algorithm(percdamp=1e-12)
    linears = {"q": linear(8, 0), "k": linear(8, 1), "o": linear(8, 2)}
    port = {Gram: observed(x)}
    statistics = UnitStatistics({"q": port, "k": port, "o": {Gram: observed(inputs(48))}})
    modules = chosen.apply(Unit("unit", linears, dict.fromkeys(linears, QuantSpec(INT4_GROUPS, FLOAT))), statistics)
    assert modules["q"].notes == modules["k"].notes != ()
    assert modules["o"].notes == ()
    bank = ExpertLinear(3, 8, 48, {"down_proj": slice(None)})
    bank.weight.copy_(random_weight(3, 8, 48))
    experts = [{Gram: observed(one)} for one in (inputs(48), x, inputs(48, seed=2))]
    unit = Unit("unit", {"unit.down": bank}, {"unit.down": QuantSpec(INT4_GROUPS, FLOAT)})
    (note,) = chosen.apply(unit, UnitStatistics({}, {"unit.down": experts}))["unit.down"].notes
    assert "for 1 of its 3 experts" in note


@pytest.mark.parametrize("act_order", [True, False])
def test_batched_experts_get_what_each_gets_alone(
    spec: TensorSpec, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, grams = random_weight(5, 20, 48), [gram(48, seed) for seed in range(5)]
    method = replace(METHOD, act_order=act_order, block_size=20)
    monkeypatch.setattr(gptq, "_BATCH", 2 * 48 * 48)  # two experts at once, then two, then one
    whole, percdamp = gptq.quantize_experts(weight, grams, spec, method)
    assert percdamp.tolist() == [method.percdamp] * 5
    for expert in range(5):
        alone = quantize(weight[expert], grams[expert], spec, method)
        offset = None if whole.offset is None else whole.offset[expert]
        same(alone, QuantizedTensor(whole.codes[expert], whole.scale[expert], offset, spec))


def same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.scale, other.scale, rtol=0, atol=0)
    assert (one.offset is None) == (other.offset is None)
    assert one.offset is None or other.offset is None or torch.equal(one.offset, other.offset)


def algorithm(**ext: object) -> LinearQuant:
    weight = {"dtype": "int4", "scope": "per_group", "group_size": 16, "symmetric": False, "method": "gptq", "ext": ext}
    return LinearQuant.from_config({"type": "linear_quant", "qconfig": {"weight": weight}})


def observed(x: Tensor) -> Gram:
    statistic = Gram()
    statistic.update(x)
    return statistic


def linear(rows: int, seed: int) -> nn.Linear:
    module = nn.Linear(48, rows, bias=False).requires_grad_(False)
    module.weight.copy_(random_weight(rows, 48, seed=seed))
    return module


@pytest.mark.parametrize("rescaled", [False, True])
def test_linears_of_one_port_share_one_decomposition(rescaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, own = {Gram: observed(inputs(48))}, {Gram: observed(inputs(48, seed=5))}
    linears = {name: linear(rows, rows) for name, rows in (("q", 20), ("o", 12), ("k", 8), ("v", 9))}
    statistics = UnitStatistics({"q": shared, "k": shared, "v": shared, "o": own})
    if rescaled:
        statistics.rescale(["q", "k", "v"], torch.linspace(0.5, 2, 48))
    specs = dict.fromkeys(linears, QuantSpec(INT4_GROUPS, FLOAT))
    seen: list[Tensor] = []
    original = gptq.factorize

    def factorize(hessian: Tensor, method: WeightMethod) -> gptq.Factor:
        seen.append(hessian)
        return original(hessian, method)

    monkeypatch.setattr(gptq, "factorize", factorize)
    modules = algorithm().apply(Unit("unit", linears, specs), statistics)
    assert [id(one) for one in seen] == [id(statistics.get(name, Gram).matrix) for name in ("q", "o")]
    assert list(modules) == ["q", "o", "k", "v"]
    for name, module in modules.items():
        matrix = statistics.get(name, Gram).matrix
        assert matrix is not None
        alone = quantize(linears[name].weight, matrix, INT4_GROUPS)
        assert torch.equal(module.codes, alone.codes)
        assert torch.equal(module.scale, alone.scale)
        assert torch.equal(module.offset, alone.offset)
        assert module.codes.untyped_storage().nbytes() == module.codes.numel()  # writing one keeps no other alive


def test_linears_of_one_port_may_have_different_schemes() -> None:
    port = {Gram: observed(inputs(48))}
    linears = {"q": linear(8, 0), "k": linear(8, 1)}
    specs = {"q": QuantSpec(INT4, FLOAT), "k": QuantSpec(replace(INT4, scale_dtype="bfloat16"), FLOAT)}
    modules = algorithm().apply(Unit("unit", linears, specs), UnitStatistics({"q": port, "k": port}))
    matrix = port[Gram].matrix
    assert matrix is not None
    for name in linears:
        assert torch.equal(modules[name].scale, quantize(linears[name].weight, matrix, specs[name].weight).scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_not_finite_is_named(bad: float) -> None:
    x = inputs(48)
    x[3, 7] = bad
    unit = Unit("unit", {"unit.q": linear(8, 0)}, {"unit.q": QuantSpec(INT4, FLOAT)})
    with pytest.raises(QuantizationError, match=r"unit\.q: its input holds NaN or infinity"):
        algorithm().apply(unit, UnitStatistics({"unit.q": {Gram: observed(x)}}))


def test_linear_or_expert_that_saw_no_token_is_named() -> None:
    unit = Unit("unit", {"unit.q": linear(8, 0)}, {"unit.q": QuantSpec(INT4, FLOAT)})
    with pytest.raises(QuantizationError, match=r"unit\.q: no calibration token reached it, so what its errors cost"):
        algorithm().apply(unit, UnitStatistics({"unit.q": {Gram: Gram()}}))
    bank = ExpertLinear(2, 8, 48, {"down_proj": slice(None)})
    bank.weight.copy_(random_weight(2, 8, 48))
    unit = Unit("unit", {"unit.down": bank}, {"unit.down": QuantSpec(INT4, FLOAT)})
    statistics = UnitStatistics({}, {"unit.down": [{Gram: observed(inputs(48))}, {Gram: Gram()}]})
    with pytest.raises(QuantizationError, match=r"unit\.down, expert 1: no calibration token"):
        algorithm().apply(unit, statistics)
