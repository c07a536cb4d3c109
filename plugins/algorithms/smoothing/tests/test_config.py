# SPDX-License-Identifier: Apache-2.0
"""Defaults as in the existing tool, what ``qconfig`` becomes, and what the schemas refuse."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft7Validator

from modelslim.api import FLOAT, QuantSpec, TensorSpec
from modelslim_smoothing.config import DYNAMIC_INT8, Choice, Rounding

INT8 = TensorSpec("int8", "per_channel")
ALL = ["norm-linear", "linear-linear", "ov", "up-down"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "smooth_quant": {"alpha": 0.5, "symmetric": True, "include": None, "exclude": None},
    "iter_smooth": {
        "alpha": 0.9,
        "scale_min": 1e-5,
        "symmetric": True,
        "enable_subgraph_type": ALL,
        "include": None,
        "exclude": None,
    },
    "flex_smooth_quant": {"alpha": None, "beta": None, "enable_subgraph_type": ALL, "include": None, "exclude": None},
    "flex_awq_ssz": {"alpha": None, "beta": None, "enable_subgraph_type": ALL, "include": None, "exclude": None},
    "awq": {"n_grid": 20, "enable_subgraph_type": ALL, "include": None, "exclude": None},
}


def schema(name: str) -> dict[str, Any]:
    text = files("modelslim_smoothing").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_existing_tool(name: str) -> None:
    properties = schema(name)["properties"]
    assert {key: one["default"] for key, one in properties.items() if "default" in one} == DEFAULTS[name]


W4: dict[str, Any] = {"weight_qconfig": {"dtype": "int4"}}


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"type": "iter_smooth", "alpha": 1}, ["alpha"]),
        ({"type": "iter_smooth", "alpha": 0}, ["alpha"]),
        ({"type": "iter_smooth", "scale_min": 0}, ["scale_min"]),
        ({"type": "iter_smooth", "enable_subgraph_type": []}, ["enable_subgraph_type"]),
        ({"type": "iter_smooth", "enable_subgraph_type": ["vo"]}, ["enable_subgraph_type", 0]),
        ({"type": "iter_smooth", "qconfig": {}}, []),
        ({"type": "smooth_quant", "scale_min": 1e-3}, []),
        ({"type": "flex_smooth_quant", "alpha": 1.5}, ["alpha"]),
        ({"type": "flex_smooth_quant", "qconfig": {"act": {}}}, ["qconfig"]),
        ({"type": "flex_awq_ssz"}, []),
        ({"type": "flex_awq_ssz", "qconfig": {"weight": {"group_size": 64}}}, ["qconfig", "weight", "group_size"]),
        ({"type": "awq"}, []),
        ({"type": "awq", **W4, "n_grid": 0}, ["n_grid"]),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_at_its_place(entry: dict[str, Any], place: list[str | int]) -> None:
    problems = list(Draft7Validator(schema(entry["type"])).iter_errors(entry))
    assert [list(problem.absolute_path) for problem in problems] == [place]


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "iter_smooth", "enable_subgraph_type": ["non-fusion"]},
        {"type": "flex_smooth_quant", "alpha": 0.5, "beta": None, "qconfig": {"weight": {}}},
        {"type": "awq", "weight_qconfig": {"dtype": "int4", "scope": "per_group", "ext": {"group_size": 32}}},
    ],
    ids=str,
)
def test_what_can_be_meant_is_taken(entry: dict[str, Any]) -> None:
    assert not list(Draft7Validator(schema(entry["type"])).iter_errors(entry))


@pytest.mark.parametrize(
    ("qconfig", "spec", "steps"),
    [
        ({"weight": {}}, QuantSpec(INT8, FLOAT), 0),
        ({"weight": {}, "act": {}}, QuantSpec(INT8, TensorSpec("int8", "per_tensor", False)), 0),
        ({"weight": {}, "act": {"scope": "per_token"}}, DYNAMIC_INT8, 0),
        ({"weight": {}, "act": {"dtype": "float"}}, QuantSpec(INT8, FLOAT), 0),
        ({"weight": {}, "act": {"method": "none"}}, QuantSpec(INT8, FLOAT), 0),
        ({"weight": {"method": "ssz"}}, QuantSpec(INT8, FLOAT), 50),
        ({"weight": {"method": "ssz", "ext": {"step": 7}}}, QuantSpec(INT8, FLOAT), 7),
        ({"weight": {"dtype": "int4", "scope": "per_group"}}, QuantSpec(TensorSpec("int4", "per_group", True, 128)), 0),
        (
            {"weight": {"scope": "per_group", "symmetric": False, "ext": {"group_size": 32}}},
            QuantSpec(TensorSpec("int8", "per_group", False, 32)),
            0,
        ),
    ],
    ids=str,
)
def test_qconfig_means_what_it_means_to_linear_quant(qconfig: dict[str, Any], spec: QuantSpec, steps: int) -> None:
    found = Rounding.parse(qconfig, ("qconfig",))
    assert (found.spec, found.steps) == (spec, steps)


def test_types_are_worked_on_in_the_order_of_work_whatever_the_order_they_are_named_in() -> None:
    assert Choice.parse({"enable_subgraph_type": ["norm-linear", "up-down", "ov"]}).types == (
        "up-down",
        "ov",
        "norm-linear",
    )
