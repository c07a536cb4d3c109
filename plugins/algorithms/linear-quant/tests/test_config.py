# SPDX-License-Identifier: Apache-2.0
"""The schema fragment, the parser of the configuration, and that both mean the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft7Validator

from modelslim.api import FLOAT, QuantSpec, TensorSpec
from modelslim_linear_quant.config import LinearQuantConfig, WeightMethod

SCHEMA: dict[str, Any] = json.loads(
    (resources.files("modelslim_linear_quant") / "linear_quant.schema.json").read_text(encoding="utf-8")
)


def entry(
    weight: Mapping[str, Any] | None = None, act: Mapping[str, Any] | None = None, **others: Any
) -> dict[str, Any]:
    qconfig: dict[str, Any] = {"weight": dict(weight or {})}
    if act is not None:
        qconfig["act"] = dict(act)
    return {"type": "linear_quant", "qconfig": qconfig, **others}


def refusals(value: Mapping[str, Any]) -> list[str]:
    """Where the schema refuses an entry, as dotted paths."""
    errors = Draft7Validator(SCHEMA).iter_errors(value)
    return sorted(".".join(map(str, error.absolute_path)) for error in errors)


def parse(weight: Mapping[str, Any] | None = None, act: Mapping[str, Any] | None = None) -> LinearQuantConfig:
    value = entry(weight, act)
    assert refusals(value) == []
    return LinearQuantConfig.parse(value)


def spec(weight: Mapping[str, Any] | None = None, act: Mapping[str, Any] | None = None) -> QuantSpec:
    return parse(weight, act).spec


INT8 = TensorSpec("int8", "per_channel")
METHODS_OF = {
    "step": ("ssz",),
    "error": ("ssz", "mse"),
    "percdamp": ("gptq",),
    "block_size": ("gptq",),
    "act_order": ("gptq",),
    "range": ("gptq",),
    "ceil_x_value": ("ceil_x",),
    "enable_search": ("ceil_x",),
    "search_min": ("ceil_x",),
    "search_max": ("ceil_x",),
    "search_step": ("ceil_x",),
}
"""The fields of ``ext`` that belong to some methods only."""


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({}, INT8),
        *(({"dtype": dtype}, TensorSpec(dtype, "per_channel")) for dtype in ("int4", "int3", "int2")),
        ({"symmetric": False}, TensorSpec("int8", "per_channel", symmetric=False)),
        ({"method": "minmax"}, INT8),
        ({"scope": "per_group"}, TensorSpec("int8", "per_group", group_size=128)),
        ({"scope": "per_group", "group_size": 64}, TensorSpec("int8", "per_group", group_size=64)),
        ({"scope": "per_group", "ext": {"group_size": 32}}, TensorSpec("int8", "per_group", group_size=32)),
        ({"scope": "per_group", "ext": {}}, TensorSpec("int8", "per_group", group_size=128)),
        ({"scope": "per_channel", "ext": {}}, INT8),
    ],
)
def test_weight_has_these_defaults(weight: Mapping[str, Any], expected: TensorSpec) -> None:
    assert spec(weight) == QuantSpec(expected, FLOAT)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (None, FLOAT),
        ({}, TensorSpec("int8", "per_tensor", symmetric=False)),
        ({"scope": "per_tensor"}, TensorSpec("int8", "per_tensor", symmetric=False)),
        ({"scope": "per_token"}, TensorSpec("int8", "per_token", symmetric=True)),
        ({"scope": "per_tensor", "symmetric": True}, TensorSpec("int8", "per_tensor", symmetric=True)),
        ({"scope": "per_token", "symmetric": False}, TensorSpec("int8", "per_token", symmetric=False)),
        ({"dtype": "int8", "method": "minmax"}, TensorSpec("int8", "per_tensor", symmetric=False)),
        ({"dtype": "float"}, FLOAT),
        ({"dtype": "float", "method": "none"}, FLOAT),
        ({"dtype": "float", "scope": "per_tensor", "symmetric": True, "method": "none"}, FLOAT),
    ],
)
def test_activation_has_these_defaults(act: Mapping[str, Any] | None, expected: TensorSpec) -> None:
    assert spec(act=act) == QuantSpec(INT8, expected)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({}, WeightMethod("minmax")),
        ({"method": "ssz"}, WeightMethod("ssz", step=50)),
        ({"method": "ssz", "ext": {"step": 3}}, WeightMethod("ssz", step=3)),
        ({"method": "mse"}, WeightMethod("mse", error="output")),
        ({"method": "mse", "ext": {"error": "weight"}}, WeightMethod("mse", error="weight")),
        ({"method": "gptq"}, WeightMethod("gptq", percdamp=0.01, block_size=128, act_order=True, range="mse")),
        (
            {
                "method": "gptq",
                "scope": "per_group",
                "ext": {"percdamp": 0.1, "block_size": 32, "group_size": 64, "act_order": False, "range": "minmax"},
            },
            WeightMethod("gptq", percdamp=0.1, block_size=32, act_order=False, range="minmax"),
        ),
    ],
)
def test_weight_method_has_these_fields(weight: Mapping[str, Any], expected: WeightMethod) -> None:
    assert parse(weight).weight == expected


@pytest.mark.parametrize(
    ("weight", "sees"),
    [
        ({}, False),
        ({"method": "ssz"}, True),
        ({"method": "ssz", "ext": {"error": "weight"}}, False),
        ({"method": "mse"}, True),
        ({"method": "mse", "ext": {"error": "weight"}}, False),
        ({"method": "gptq"}, True),
    ],
)
def test_methods_that_minimize_the_error_of_the_output_see_inputs(weight: Mapping[str, Any], sees: bool) -> None:
    assert parse(weight).weight.sees_inputs == sees


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (None, "minmax"),
        ({}, "minmax"),
        ({"method": "histogram"}, "histogram"),
        ({"method": "histogram", "symmetric": True}, "histogram"),
        ({"dtype": "float", "method": "none"}, "minmax"),
    ],
)
def test_activation_method(act: Mapping[str, Any] | None, expected: str) -> None:
    assert parse(act=act).activation == expected


@pytest.mark.parametrize("field", METHODS_OF)
def test_field_of_another_method_is_refused_with_the_method_that_has_it(field: str) -> None:
    bounds = {"ceil_x_value": 7, "search_min": 7, "search_max": 7, "enable_search": True}
    values = {"error": "weight", "act_order": True, "range": "mse", **bounds}
    for method in (None, "minmax", "ssz", "mse", "gptq", "ceil_x"):
        weight: dict[str, Any] = {"ext": {field: values.get(field, 1)}}
        if method == "ceil_x":
            weight["dtype"] = "mxfp4"
        if method is not None:
            weight["method"] = method
        places = [] if method in METHODS_OF[field] else [f"qconfig.weight.ext.{field}"]
        assert refusals(entry(weight)) == places, method


def test_all_linears_are_included_and_none_excluded_by_default() -> None:
    selector = LinearQuantConfig.parse(entry()).selector
    assert (list(selector.include), list(selector.exclude)) == (["*"], [])
    selector = LinearQuantConfig.parse(entry(include=["*mlp*"], exclude=["*.gate"])).selector
    assert (list(selector.include), list(selector.exclude)) == (["*mlp*"], ["*.gate"])


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"type": "linear_quant"}, [""]),
        ({"type": "linear_quant", "qconfig": {}}, ["qconfig"]),
        ({"type": "linear_quantize", "qconfig": {"weight": {}}}, ["type"]),
        (entry(unknown=1), [""]),
        (entry({"unknown": 1}), ["qconfig.weight"]),
        (entry(act={"unknown": 1}), ["qconfig.act"]),
        (entry({"dtype": "int1"}), ["qconfig.weight.dtype"]),
        (entry({"dtype": "float"}), ["qconfig.weight.dtype"]),
        (entry({"scope": "per_token"}), ["qconfig.weight.scope"]),
        (entry({"method": "none"}), ["qconfig.weight.method"]),
        (entry({"method": "histogram"}), ["qconfig.weight.method"]),
        (entry({"method": "ssz", "ext": {"step": 0}}), ["qconfig.weight.ext.step"]),
        (entry({"method": "mse", "ext": {"error": "input"}}), ["qconfig.weight.ext.error"]),
        (entry({"method": "gptq", "ext": {"percdamp": 0}}), ["qconfig.weight.ext.percdamp"]),
        (entry({"method": "gptq", "ext": {"block_size": 0}}), ["qconfig.weight.ext.block_size"]),
        (entry({"method": "gptq", "ext": {"range": "full"}}), ["qconfig.weight.ext.range"]),
        (entry({"method": "gptq", "ext": {"act_order": 1}}), ["qconfig.weight.ext.act_order"]),
        (entry(act={"method": "ssz"}), ["qconfig.act.method"]),
        (entry(act={"method": "histogram", "scope": "per_token"}), ["qconfig.act.method"]),
        (entry(act={"method": "histogram", "dtype": "float"}), ["qconfig.act.method"]),
        (entry({"symmetric": "yes"}), ["qconfig.weight.symmetric"]),
        (entry({"scope": "per_group", "group_size": 0}), ["qconfig.weight.group_size"]),
        (entry({"scope": "per_group", "group_size": "128"}), ["qconfig.weight.group_size"]),
        (entry({"scope": "per_group", "group_size": 1.5}), ["qconfig.weight.group_size"]),
        (entry({"group_size": 128}), ["qconfig.weight.group_size"]),
        (entry({"ext": {"group_size": 128}}), ["qconfig.weight.ext.group_size"]),
        (
            entry({"scope": "per_group", "group_size": 64, "ext": {"group_size": 64}}),
            ["qconfig.weight.ext.group_size"],
        ),
        (entry({"scope": "per_group", "ext": {"size": 64}}), ["qconfig.weight.ext"]),
        (entry(act={"dtype": "int4"}), ["qconfig.act"]),
        (entry(act={"dtype": "uint4"}), ["qconfig.act.dtype"]),
        (entry(act={"scope": "per_channel"}), ["qconfig.act.scope"]),
        (entry(act={"group_size": 64}), ["qconfig.act"]),
        (entry(act={"method": "none"}), ["qconfig.act.method"]),
        (entry(act={"dtype": "int8", "method": "none"}), ["qconfig.act.method"]),
        (entry(act={"dtype": "float", "method": "minmax"}), ["qconfig.act.method"]),
        (entry(act={"dtype": "float", "scope": "per_token"}), ["qconfig.act.scope"]),
        (entry(act={"dtype": "float", "symmetric": False}), ["qconfig.act.symmetric"]),
        (entry(include=[]), ["include"]),
        (entry(include=[""]), ["include.0"]),
        (entry(include="*"), ["include"]),
        (entry(exclude=[3]), ["exclude.0"]),
    ],
)
def test_entry_that_means_nothing_is_refused_at_its_place(value: Mapping[str, Any], places: list[str]) -> None:
    assert refusals(value) == places


class Recorder(dict[str, Any]):
    """A mapping that remembers which of its keys were asked for, with those of the mappings inside it."""

    def __init__(self, value: Mapping[str, Any], path: str, seen: set[str]) -> None:
        super().__init__(
            {
                key: Recorder(item, f"{path}{key}.", seen) if isinstance(item, dict) else item
                for key, item in value.items()
            }
        )
        self._path = path
        self._seen = seen

    def __getitem__(self, key: str) -> Any:
        self._seen.add(f"{self._path}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(f"{self._path}{key}")
        return super().get(key, default)


def properties(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every property of the schema with its dotted path."""
    for name, value in schema.get("properties", {}).items():
        if "$ref" in value:
            value = SCHEMA["definitions"][value["$ref"].rpartition("/")[2]]
        yield f"{path}{name}", value
        yield from properties(value, f"{path}{name}.")


def test_parser_reads_exactly_the_properties_of_the_schema() -> None:
    seen: set[str] = set()
    values = [
        entry({"scope": "per_group", "ext": {"group_size": 64}}, {"scope": "per_token"}, include=["*"]),
        entry({"dtype": "int8"}, {"dtype": "float"}),
        entry(fallback={"above": 0.5, "to": "float"}),
    ]
    for value in values:
        LinearQuantConfig.parse(Recorder(value, "", seen))
    # A property with one possible value tells the parser nothing.
    fixed = {path for path, value in properties(SCHEMA) if "const" in value or len(value.get("enum", [])) == 1}
    assert seen == {path for path, _ in properties(SCHEMA)} - fixed


def test_parser_has_the_defaults_that_the_schema_states() -> None:
    assert LinearQuantConfig.parse(entry()) == LinearQuantConfig.parse(entry(include=["*"], exclude=[]))
    stated = {path: value["default"] for path, value in properties(SCHEMA) if "default" in value}
    assert stated.pop("include") == ["*"]
    assert stated.pop("exclude") == []
    assert (stated.pop("fallback.metric"), stated.pop("fallback.to")) == ("relative_error", "float")
    fallen = LinearQuantConfig.parse(entry(fallback={"above": 0.5}))
    assert (fallen.above, fallen.to) == (0.5, None)
    assert LinearQuantConfig.parse(entry()).above is None
    for path, default in stated.items():
        _, part, *rest = path.split(".")
        keys = {"scope": "per_group"} if rest[-1] == "group_size" else {}
        if rest[-1] in METHODS_OF:
            method = METHODS_OF[rest[-1]][0]
            keys = {"method": method, **({"dtype": "mxfp4"} if method == "ceil_x" else {})}
        written = {**keys, **({"ext": {rest[1]: default}} if rest[0] == "ext" else {rest[0]: default})}
        act: dict[str, Any] | None = {} if part == "act" else None
        assert parse(**{"act": act, part: keys}) == parse(**{"act": act, part: written}), path


def test_every_property_is_described() -> None:
    assert [path for path, value in properties(SCHEMA) if not value.get("description")] == []
