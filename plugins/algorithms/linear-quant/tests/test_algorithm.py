# SPDX-License-Identifier: Apache-2.0
"""Which linears are chosen, what is refused, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from modelslim.api import (
    FLOAT,
    ChannelEnergy,
    Gram,
    LinearInfo,
    QuantSpec,
    Statistic,
    TensorRange,
    TensorSpec,
    Unit,
    UnitStatistics,
)
from modelslim_linear_quant.algorithm import LinearQuant
from modelslim_linear_quant.histogram import Histogram


def info(name: str, unit: str, inputs: int) -> LinearInfo:
    return LinearInfo(name, name, unit, 64, inputs, False, "bfloat16")


LINEARS = [
    *(
        info(f"model.layers.{layer}.{name}", f"model.layers.{layer}", inputs)
        for layer in range(2)
        for name, inputs in (("self_attn.q_proj", 256), ("mlp.up_proj", 256), ("mlp.down_proj", 384))
    ),
    info("lm_head", "", 256),
]
Part = Mapping[str, Any] | None


def algorithm(weight: Part = None, act: Part = None, **keys: Any) -> LinearQuant:
    qconfig = {"weight": weight or {}} | ({} if act is None else {"act": act})
    return LinearQuant.from_config({"type": "linear_quant", "qconfig": qconfig, **keys})


def test_chosen_linears_are_those_included_and_not_excluded() -> None:
    chosen = algorithm({"dtype": "int4"}, include=["*mlp*", "lm_head"], exclude=["*.1.*", "*.down_proj"])
    assert chosen.select(LINEARS) == {
        name: QuantSpec(TensorSpec("int4", "per_channel"), FLOAT) for name in ("model.layers.0.mlp.up_proj", "lm_head")
    }


def test_all_linears_of_the_units_are_chosen_by_default() -> None:
    assert list(algorithm().select(LINEARS)) == [linear.name for linear in LINEARS if linear.unit]


def test_patterns_come_with_their_places() -> None:
    patterns = algorithm(include=["*a*", "*b*"], exclude=["*c*"]).patterns()
    assert list(patterns) == [(("include", 0), "*a*"), (("include", 1), "*b*"), (("exclude", 0), "*c*")]


def test_group_size_that_divides_all_inputs_is_no_problem() -> None:
    assert not algorithm({"scope": "per_group"}).check(LINEARS)
    assert not algorithm().check(LINEARS)


def test_group_size_that_does_not_divide_is_refused_once_per_size_of_input() -> None:
    problems = algorithm({"scope": "per_group", "group_size": 100}).check(LINEARS)
    assert [problem.message for problem in problems] == [
        "group_size 100 does not divide the 256 inputs of model.layers.0.self_attn.q_proj and 3 others",
        "group_size 100 does not divide the 384 inputs of model.layers.0.mlp.down_proj and 1 others",
    ]
    assert [problem.hint for problem in problems] == [
        "sizes that do: 32, 64, 128, 256",
        "sizes that do: 32, 64, 128",
    ]
    assert all(problem.fatal and problem.path == ("qconfig", "weight") for problem in problems)


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [(48, "16, 24, 48"), (100, "20, 25, 50, 100"), (17, "17"), (8, "8"), (1024, "32, 64, 128, 256, 512")],
)
def test_refused_group_size_comes_with_sizes_that_divide(inputs: int, sizes: str) -> None:
    (problem,) = algorithm({"scope": "per_group", "group_size": 31}).check([info("a.b", "a", inputs)])
    assert problem.hint == f"sizes that do: {sizes}"


def test_group_size_of_a_linear_that_is_not_chosen_does_not_matter() -> None:
    assert not algorithm({"scope": "per_group", "group_size": 256}, exclude=["*down_proj"]).check(LINEARS)


def unit(chosen: LinearQuant) -> Unit:
    linears = {found.name: nn.Linear(found.in_features, 4) for found in LINEARS if found.unit == "model.layers.0"}
    specs = {name: spec for name, spec in chosen.select(LINEARS).items() if name in linears}
    return Unit("model.layers.0", linears, specs)


@pytest.mark.parametrize(
    ("act", "measured"), [(None, False), ({"scope": "per_token"}, False), ({"dtype": "float"}, False), ({}, True)]
)
def test_range_is_measured_of_the_inputs_of_static_linears_only(act: Part, measured: bool) -> None:
    chosen = algorithm(act=act, include=["*mlp*"])
    expected = {f"model.layers.0.mlp.{name}": frozenset({TensorRange}) for name in ("up_proj", "down_proj")}
    assert chosen.needs(unit(chosen)) == (expected if measured else {})


@pytest.mark.parametrize(
    ("weight", "act", "kinds"),
    [
        ({"method": "gptq"}, None, {Gram}),
        ({"method": "mse"}, {"scope": "per_token"}, {ChannelEnergy}),
        ({"method": "mse", "ext": {"error": "weight"}}, None, set()),
        ({"method": "ssz"}, None, {ChannelEnergy}),
        ({"method": "ssz", "ext": {"error": "weight"}}, None, set()),
        ({"method": "gptq"}, {}, {Gram, TensorRange}),
        ({}, {"method": "histogram"}, {Histogram}),
        ({"method": "mse"}, {"method": "histogram"}, {ChannelEnergy, Histogram}),
    ],
)
def test_methods_measure_what_they_see(weight: Part, act: Part, kinds: set[type[Statistic]]) -> None:
    chosen = algorithm(weight, act, include=["*up_proj"])
    assert chosen.needs(unit(chosen)) == ({"model.layers.0.mlp.up_proj": frozenset(kinds)} if kinds else {})


@pytest.mark.parametrize(("method", "expected"), [("minmax", False), ("ssz", False), ("mse", False), ("gptq", True)])
def test_only_gptq_makes_up_for_errors_of_earlier_layers(method: str, expected: bool) -> None:
    assert algorithm({"method": method}).compensates is expected


def test_linears_of_other_entries_are_not_touched() -> None:
    chosen = algorithm(include=["*up_proj"])
    with torch.no_grad():
        assert chosen.apply(unit(chosen), UnitStatistics({})).keys() == {"model.layers.0.mlp.up_proj"}
