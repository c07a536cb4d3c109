# SPDX-License-Identifier: Apache-2.0
"""What the processors make of a unit: shared inputs, experts, and inputs that tell nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelslim.api import (
    Algorithm,
    ExpertLinear,
    Gram,
    QuantizationError,
    QuantizedExperts,
    QuantizedLinear,
    Statistic,
    TensorRange,
    Unit,
    UnitStatistics,
)
from modelslim.testing.units import describe
from modelslim_sparse.float_sparse import FloatSparse
from modelslim_sparse.lowbit_sparse import LowbitSparse

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
BOTH = [FloatSparse.from_config({"sparse_ratio": 0.4}), LowbitSparse.from_config({})]


@pytest.fixture
def linears() -> dict[str, nn.Linear]:
    """Two linears of one input; the weights of one are much smaller."""
    torch.manual_seed(0)
    found = {Q: nn.Linear(64, 48), K: nn.Linear(64, 16, bias=False)}
    with torch.no_grad():
        found[K].weight *= 0.01
    return {name: one.requires_grad_(False) for name, one in found.items()}


def work(algorithm: Algorithm, linears: dict[str, nn.Linear], x: torch.Tensor) -> dict[str, nn.Module]:
    port: dict[type[Statistic], Statistic] = {Gram: Gram(), TensorRange: TensorRange()}
    for statistic in port.values():
        statistic.update(x)
    specs = {name: spec for name, spec in algorithm.select(describe(linears)).items() if name in linears}
    unit = Unit("model.layers.0", linears, specs)
    return dict(algorithm.apply(unit, UnitStatistics(dict.fromkeys(linears, port))))


def test_linears_of_one_input_lose_a_share_each(linears: dict[str, nn.Linear]) -> None:
    made = work(BOTH[0], linears, torch.randn(200, 64))
    for name, linear in linears.items():
        module = made[name]
        assert isinstance(module, QuantizedLinear)
        size = linear.weight.numel()
        assert int((module.codes == 0).sum()) == size - round(0.6 * size)
        assert (module.bias is None) is (linear.bias is None)
        assert module.notes == ()


@pytest.mark.parametrize("algorithm", BOTH)
def test_output_is_near_that_of_the_float_linear(algorithm: Algorithm, linears: dict[str, nn.Linear]) -> None:
    x = torch.randn(400, 64) @ torch.randn(64, 64)
    for name, module in work(algorithm, linears, x).items():
        y = linears[name](x)
        assert (module(x) - y).norm() < 0.15 * y.norm()


@pytest.mark.parametrize("algorithm", BOTH)
def test_input_that_is_not_finite_is_named(algorithm: Algorithm, linears: dict[str, nn.Linear]) -> None:
    x = torch.randn(20, 64)
    x[3, 5] = torch.nan
    with pytest.raises(QuantizationError, match=f"{Q}: its input holds NaN or infinity"):
        work(algorithm, linears, x)


@pytest.mark.parametrize("algorithm", BOTH)
def test_input_of_few_tokens_has_a_solution(algorithm: Algorithm, linears: dict[str, nn.Linear]) -> None:
    x = torch.randn(3, 64)
    for name, module in work(algorithm, linears, x).items():
        y = linears[name](x)
        assert (module(x) - y).norm() < 0.2 * y.norm()


def test_experts_have_a_mask_each() -> None:
    generator = torch.Generator().manual_seed(4)
    bank = ExpertLinear(3, 24, 32, {"down_proj": slice(None)})
    with torch.no_grad():
        bank.weight.copy_(torch.randn(bank.weight.shape, generator=generator) * torch.tensor([1, 0.1, 9]).view(3, 1, 1))
    statistics: list[dict[type[Statistic], Statistic]] = [{Gram: Gram()} for _ in range(3)]
    for one in statistics:
        one[Gram].update(torch.randn(100, 32, generator=generator))
    name = "model.layers.0.mlp.experts.down_proj"
    unit = Unit(
        "model.layers.0", {name: bank}, dict.fromkeys([name], BOTH[0].select(describe({Q: nn.Linear(1, 1)}))[Q])
    )
    module = BOTH[0].apply(unit, UnitStatistics({}, {name: statistics}))[name]
    assert isinstance(module, QuantizedExperts)
    size = bank.weight[0].numel()
    assert [int((codes == 0).sum()) for codes in module.codes] == [size - round(0.6 * size)] * 3
