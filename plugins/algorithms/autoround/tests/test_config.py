# SPDX-License-Identifier: Apache-2.0
"""The schema fragment, the parser of the configuration, and that both mean the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft7Validator

from modelslim.api import FLOAT, LinearInfo, QuantSpec, TensorSpec
from modelslim_autoround.algorithm import AutoRoundQuant
from modelslim_autoround.config import AutoRoundConfig, Training

SCHEMA: dict[str, Any] = json.loads(
    (resources.files("modelslim_autoround") / "autoround_quant.schema.json").read_text(encoding="utf-8")
)
INT4 = TensorSpec("int4", "per_channel")


def entry(weight: Mapping[str, Any] | None = None, act: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    qconfig: dict[str, Any] = {"weight": dict(weight or {})}
    if act is not None:
        qconfig["act"] = dict(act)
    return {"type": "autoround_quant", "strategies": [{"qconfig": qconfig}], **fields}


def refusals(value: Mapping[str, Any]) -> list[str]:
    """Where the schema refuses an entry, as dotted paths."""
    errors = Draft7Validator(SCHEMA).iter_errors(value)
    return sorted(".".join(map(str, error.absolute_path)) for error in errors)


def spec(weight: Mapping[str, Any] | None = None, act: Mapping[str, Any] | None = None) -> QuantSpec:
    value = entry(weight, act)
    assert refusals(value) == []
    return AutoRoundConfig.parse(value).strategies[0].spec


@pytest.mark.parametrize(
    ("weight", "act", "expected"),
    [
        ({}, None, QuantSpec(TensorSpec("int8", "per_channel"), FLOAT)),
        ({"dtype": "int4", "method": "autoround"}, {"dtype": "float"}, QuantSpec(INT4, FLOAT)),
        ({"dtype": "int4"}, {}, QuantSpec(INT4, TensorSpec("int8", "per_tensor", symmetric=False))),
        ({"dtype": "int4"}, {"scope": "per_token"}, QuantSpec(INT4, TensorSpec("int8", "per_token"))),
        ({"scope": "per_group"}, None, QuantSpec(TensorSpec("int8", "per_group", group_size=128), FLOAT)),
        (
            {"scope": "per_group", "ext": {"group_size": 32, "scale_dtype": "bfloat16"}, "symmetric": False},
            None,
            QuantSpec(TensorSpec("int8", "per_group", symmetric=False, group_size=32), FLOAT),
        ),
    ],
)
def test_strategy_says_what_linears_become(
    weight: Mapping[str, Any], act: Mapping[str, Any] | None, expected: QuantSpec
) -> None:
    assert spec(weight, act) == expected


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"type": "autoround_quant"}, [""]),
        ({"type": "autoround_quant", "strategies": []}, ["strategies"]),
        ({"type": "autoround_quant", "strategies": [{}]}, ["strategies.0"]),
        (entry(unknown=1), [""]),
        (entry(iters=-1), ["iters"]),
        (entry(lr=0), ["lr"]),
        (entry(minmax_lr=2), ["minmax_lr"]),
        (entry(batch_size=0), ["batch_size"]),
        (entry(samples=0), ["samples"]),
        (entry(start="best"), ["start"]),
        (entry(enable_round_tuning=1), ["enable_round_tuning"]),
        (entry({"dtype": "int1"}), ["strategies.0.qconfig.weight.dtype"]),
        (entry({"group_size": 64}), ["strategies.0.qconfig.weight.group_size"]),
        (entry(act={"dtype": "int4"}), ["strategies.0.qconfig.act.dtype"]),
    ],
)
def test_entry_that_means_nothing_is_refused_at_its_place(value: Mapping[str, Any], places: list[str]) -> None:
    assert refusals(value) == places


def properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every property of the schema, at any depth."""
    if "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    for name, value in schema.get("properties", {}).items():
        yield name, value
        yield from properties(value)
        yield from properties(value.get("items", {}))


def test_every_property_is_described() -> None:
    assert [name for name, value in properties(SCHEMA) if not value.get("description") and "$ref" not in value] == []


def test_parser_has_the_fields_and_defaults_of_the_schema() -> None:
    stated = {name: one["default"] for name, one in SCHEMA["properties"].items() if "default" in one}
    assert set(stated) == set(SCHEMA["properties"]) - {"type", "strategies"}
    assert AutoRoundConfig.parse(entry()).training == AutoRoundConfig.parse(entry(**stated)).training == Training()
    for name, default in stated.items():
        other = {"start": "mse"}.get(name, not default if isinstance(default, bool) else default * 2)
        assert refusals(entry(**{name: other})) == []
        assert AutoRoundConfig.parse(entry(**{name: other})).training != Training(), name


def infos(inputs: int = 256) -> list[LinearInfo]:
    names = ("a.0.up", "a.0.down", "a.1.up")
    return [LinearInfo(name, name, name[:3], 64, inputs, False, "bfloat16") for name in names]


def test_first_strategy_that_names_a_linear_counts() -> None:
    value = entry()
    value["strategies"] = [
        {"qconfig": {"weight": {"dtype": "int4"}}, "include": ["*.up"], "exclude": ["a.1*"]},
        {"qconfig": {"weight": {}}, "exclude": ["*down"]},
    ]
    assert refusals(value) == []
    algorithm = AutoRoundQuant.from_config(value)
    chosen = algorithm.select(infos())
    assert {name: one.weight.bits for name, one in chosen.items()} == {"a.0.up": 4, "a.1.up": 8}
    assert algorithm.patterns() == [
        (("strategies", 0, "include", 0), "*.up"),
        (("strategies", 0, "exclude", 0), "a.1*"),
        (("strategies", 1, "include", 0), "*"),
        (("strategies", 1, "exclude", 0), "*down"),
    ]


def test_group_size_that_does_not_divide_is_refused() -> None:
    algorithm = AutoRoundQuant.from_config(entry({"scope": "per_group", "group_size": 24}))
    (problem,) = algorithm.check(infos(48 + 16))
    assert problem.message == "group_size 24 does not divide the 64 inputs of a.0.up and 2 others"
    assert problem.hint == "sizes that do: 32, 64"
    assert not algorithm.check(infos(48))
