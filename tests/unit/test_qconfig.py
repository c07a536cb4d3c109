# SPDX-License-Identifier: Apache-2.0
"""What a qconfig means, to every algorithm alike, and what its group sizes are refused for."""

from __future__ import annotations

from typing import Any

import pytest

from modelslim.qconfig import check_group_sizes, parse_activation, parse_qconfig, parse_weight
from modelslim.types import BITS, FLOAT, LinearInfo, QuantSpec, TensorSpec


@pytest.mark.parametrize(
    ("leaf", "spec"),
    [
        ({}, TensorSpec("int8", "per_channel")),
        ({"symmetric": False}, TensorSpec("int8", "per_channel", symmetric=False)),
        ({"scope": "per_group"}, TensorSpec("int8", "per_group", group_size=128)),
        ({"scope": "per_group", "group_size": 32}, TensorSpec("int8", "per_group", group_size=32)),
        ({"scope": "per_group", "ext": {"group_size": 64}}, TensorSpec("int8", "per_group", group_size=64)),
        ({"scope": "per_channel", "ext": {"step": 3}}, TensorSpec("int8", "per_channel")),
    ],
    ids=str,
)
def test_weight_has_these_defaults(leaf: dict[str, Any], spec: TensorSpec) -> None:
    assert parse_weight(leaf) == spec


@pytest.mark.parametrize(
    ("leaf", "spec"),
    [
        (None, FLOAT),
        ({"dtype": "float"}, FLOAT),
        ({"method": "none"}, FLOAT),
        ({}, TensorSpec("int8", "per_tensor", symmetric=False)),
        ({"scope": "per_token"}, TensorSpec("int8", "per_token")),
        ({"scope": "per_tensor", "symmetric": True}, TensorSpec("int8", "per_tensor")),
        ({"scope": "per_token", "symmetric": False}, TensorSpec("int8", "per_token", symmetric=False)),
        ({"method": "histogram"}, TensorSpec("int8", "per_tensor", symmetric=False)),
    ],
    ids=str,
)
def test_input_has_these_defaults(leaf: dict[str, Any] | None, spec: TensorSpec) -> None:
    assert parse_activation(leaf) == spec


@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2"])
def test_integers_of_every_width_are_taken_by_name(dtype: str) -> None:
    found = parse_qconfig({"weight": {"dtype": dtype}, "act": {"scope": "per_token", "dtype": dtype}})
    assert found == QuantSpec(TensorSpec(dtype, "per_channel"), TensorSpec(dtype, "per_token"))
    bits = int(dtype.removeprefix("int"))
    assert (BITS[dtype], found.weight.bits) == (bits, bits)
    assert (found.weight.qmin, found.weight.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert found.scheme == f"W{bits}A{bits}_DYNAMIC"


def linear(name: str, inputs: int) -> LinearInfo:
    return LinearInfo(name, name, "unit", 64, inputs, False, "bfloat16")


def test_group_sizes_that_do_not_divide_are_told_once_per_size_and_width() -> None:
    small, large = (TensorSpec("int4", "per_group", group_size=size) for size in (48, 64))
    chosen = [
        (linear("a.q_proj", 96), large),
        (linear("a.k_proj", 96), large),
        (linear("a.o_proj", 96), small),
        (linear("a.up_proj", 100), small),
        (linear("a.gate_proj", 17), TensorSpec("int4", "per_channel")),
    ]
    problems = check_group_sizes(chosen, ("qconfig", "weight"))
    assert [(problem.message, problem.hint) for problem in problems] == [
        ("group_size 64 does not divide the 96 inputs of a.q_proj and 1 others", "sizes that do: 32"),
        ("group_size 48 does not divide the 100 inputs of a.up_proj", "sizes that do: 20, 25, 50, 100"),
    ]
    assert {problem.path for problem in problems} == {("qconfig", "weight")}
    assert all(problem.fatal for problem in problems)
