# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from modelslim.errors import PluginError, ProtocolError
from modelslim.protocol.compose import apiversions, compose
from modelslim.protocol.document import parse_document, read_document
from modelslim.protocol.validate import load_document
from modelslim.registry import Entry, Registry

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FRAGMENTS = [
    *sorted((ROOT / "schemas").glob("*.schema.json")),
    *(
        path
        for kind in ("algorithms", "savers")
        for path in sorted((ROOT / "plugins" / kind).glob("*/*/*.schema.json"))
    ),
]

FRAGMENT: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$id": "urn:example:double",
    "type": "object",
    "required": ["type"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "do/uble ~x"},
        "factor": {"$ref": "#/definitions/positive"},
        "again": {"$ref": "#"},
        "then": {"type": "array", "items": {"$ref": "urn:modelslim:processor"}},
    },
    "definitions": {"positive": {"type": "number", "exclusiveMinimum": 0}},
}


def nodes(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping inside a schema."""
    if isinstance(schema, dict):
        yield path, schema
        for key, item in schema.items():
            yield from nodes(item, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from nodes(item, f"{path}/{index}")


Install = Callable[[str, Any], Registry]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Registers a third party's algorithm with a fragment, without an installation."""

    def registered(name: str, fragment: Any) -> Registry:
        package = tmp_path / "third_party_quant"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
        (package / f"{name.replace('/', '_')}.schema.json").write_text(json.dumps(fragment), encoding="utf-8")
        if "/" in name:
            (package / name).parent.mkdir()
            (package / f"{name}.schema.json").write_text(json.dumps(fragment), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "third_party_quant", raising=False)
        rows = Registry.scan({"MODELSLIM_PLUGINS": "modelslim-saver-ascendv1"}).entries
        row = Entry("algorithms", name, "third_party_quant.algorithm:Double", "third-party-quant", "1.2")
        return Registry((row, *rows))

    return registered


def protocol(*entries: str) -> str:
    lines = "\n".join(f"    - {entry}" for entry in entries)
    return f"apiversion: modelslim_v1\nspec:\n  process:\n{lines}\n  save: [{{type: ascendv1_saver}}]\n"


def test_the_apiversions_are_the_files() -> None:
    assert apiversions() == ["modelslim_v1", "multimodal_vlm_modelslim_v1"]


@pytest.mark.parametrize("apiversion", apiversions())
def test_the_composed_schema_stands_alone(apiversion: str, registry: Registry) -> None:
    schema = compose(apiversion, registry)
    Draft7Validator.check_schema(schema)
    json.dumps(schema)
    for path, node in nodes(schema):
        reference = node.get("$ref")
        if isinstance(reference, str):
            assert reference.startswith("#/definitions/"), path


@pytest.mark.parametrize("path", sorted((HERE / "good").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plain_validator_accepts_the_good_protocols(path: Path, registry: Registry) -> None:
    value = read_document(path).value
    Draft7Validator(compose(value["apiversion"], registry)).validate(value)


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "linear_quant"},
        {"type": "linear_quant", "qconfig": {"weight": {}}, "color": 1},
        {"type": "linear_quant", "qconfig": {"weight": {"group_size": 8}}},
        {
            "type": "linear_quant",
            "qconfig": {"weight": {"scope": "per_group", "group_size": 8, "ext": {"group_size": 8}}},
        },
        {"type": "linear_quant", "qconfig": {"act": {"method": "none"}, "weight": {}}},
        {"type": "group", "configs": [{"type": "linear_quant"}]},
        {"type": "group", "configs": []},
        {"type": "unknown"},
        {},
    ],
)
def test_a_plain_validator_refuses_what_modelslim_refuses(entry: dict[str, Any], registry: Registry) -> None:
    validator = Draft7Validator(compose("modelslim_v1", registry))
    document = {"apiversion": "modelslim_v1", "spec": {"process": [entry], "save": [{"type": "ascendv1_saver"}]}}
    assert not validator.is_valid(document)
    with pytest.raises(ProtocolError):
        load_document(parse_document(json.dumps(document)), registry)


def test_an_editor_is_offered_the_installed_names(registry: Registry) -> None:
    schema = compose("modelslim_v1", registry)
    names = {kind: schema["definitions"][kind]["properties"]["type"]["enum"] for kind in ("processor", "saver")}
    assert names == {"processor": ["group", "linear_quant"], "saver": ["ascendv1_saver"]}
    runners = schema["properties"]["spec"]["properties"]["runner"]["enum"]
    assert runners == ["auto", *registry.names("runners")]


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_every_mapping_is_closed_and_every_property_described(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    Draft7Validator.check_schema(schema)
    for where, node in nodes(schema):
        if "properties" not in node or "type" not in node or not isinstance(node["type"], str):
            continue
        # The top level holds anchors; processors and savers are closed by their fragments.
        open_ones = ("#",) if "apiversion" in node["properties"] else ("#/definitions/processor", "#/definitions/saver")
        assert node.get("additionalProperties") is False or where in open_ones, where
        for name, declaration in node["properties"].items():
            target = declaration
            if declaration.get("$ref", "").startswith("#/definitions/"):
                target = schema["definitions"][declaration["$ref"].rpartition("/")[2]]
            assert target.get("description", "").endswith("."), f"{where}/properties/{name}"


def test_the_apiversions_agree_on_what_they_share() -> None:
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in FRAGMENTS[:2])
    # One runner instead of those that are installed, and other data; all else means the same.
    for part, own in ((("definitions",), set()), (("properties", "spec", "properties"), {"runner", "dataset"})):
        one, two = first, second
        for key in part:
            one, two = one[key], two[key]
        assert {key for key in one.keys() & two.keys() if one[key] != two[key]} == own


def test_a_multimodal_protocol_takes_any_word_for_the_runner(registry: Registry) -> None:
    runner = compose("multimodal_vlm_modelslim_v1", registry)["properties"]["spec"]["properties"]["runner"]
    assert runner["type"] == "string" and "enum" not in runner
    assert runner["default"] == "layer_wise"


def test_references_of_a_fragment_keep_their_meaning(install: Install) -> None:
    registry = install("do/uble ~x", FRAGMENT)
    good = "{type: 'do/uble ~x', factor: 2, then: [{type: 'do/uble ~x'}], again: {type: 'do/uble ~x'}}"
    assert load_document(parse_document(protocol(good)), registry).process[0].config["factor"] == 2
    bad = protocol("{type: 'do/uble ~x', factor: 0, then: [{type: x}], again: {type: 'do/uble ~x', fact: 1}}")
    with pytest.raises(ProtocolError) as caught:
        load_document(parse_document(bad), registry)
    assert [(diagnostic.path, diagnostic.message) for diagnostic in caught.value.diagnostics] == [
        ("spec.process[0].factor", "must be more than 0, not 0"),
        ("spec.process[0].then[0].type", "unknown processor 'x'"),
        ("spec.process[0].again.fact", "unknown key 'fact'"),
    ]
    Draft7Validator.check_schema(compose("modelslim_v1", registry))


def changed(**changes: Any) -> dict[str, Any]:
    return {"type": "object", "required": ["type"], "additionalProperties": False, **changes}


KIND = {"type": {"const": "double"}}


@pytest.mark.parametrize(
    ("fragment", "flaw"),
    [
        (changed(properties={}), "its property 'type' must have the const 'double'"),
        (changed(properties={"type": {"const": "triple"}}), "its property 'type' must have the const 'double'"),
        (changed(properties={"type": True}), "its property 'type' must have the const 'double'"),
        (changed(properties=KIND, required=[]), "it must be of type object and require 'type'"),
        (changed(properties=KIND, type="array"), "it must be of type object and require 'type'"),
        (changed(properties=KIND, additionalProperties=True), "it must set additionalProperties to false"),
        (changed(properties={**KIND, "a": {"type": "strin"}}), "not a draft-07 schema: 'strin' is not valid"),
        (changed(properties={**KIND, "a": {"$ref": "#/definitions/b"}}), "$ref '#/definitions/b' leads nowhere"),
        (changed(properties={**KIND, "a": {"$ref": "https://example.com/s.json"}}), "leads nowhere"),
        (changed(properties={**KIND, "a": {"$id": "urn:x", "type": "string"}}), "$id 'urn:x' below the top"),
    ],
)
def test_an_unusable_fragment_is_an_error_that_names_the_distribution(
    fragment: dict[str, Any], flaw: str, install: Install
) -> None:
    registry = install("double", fragment)
    with pytest.raises(PluginError) as caught:
        load_document(parse_document(protocol("{type: double}")), registry)
    assert caught.value.message.startswith(
        f"the JSON Schema of algorithm 'double' of third-party-quant 1.2 is unusable: {flaw}"
    ) or (flaw == "leads nowhere" and caught.value.message.endswith(flaw))
    assert "third-party-quant" in caught.value.hint


def test_a_missing_key_that_is_declared_as_anything_is_named(install: Install) -> None:
    fragment = changed(properties={**KIND, "free": True}, required=["type", "free", "undeclared"])
    with pytest.raises(ProtocolError) as caught:
        load_document(parse_document(protocol("{type: double}")), install("double", fragment))
    found = [str(diagnostic) for diagnostic in caught.value.diagnostics]
    assert found == [
        "<string>:4:7: spec.process[0].free: missing key 'free'",
        "<string>:4:7: spec.process[0].undeclared: missing key 'undeclared'",
    ]


def test_an_unusable_fragment_disturbs_no_protocol_that_leaves_it_alone(install: Install) -> None:
    other = changed(properties={"type": {"const": "other"}})
    registry = install("double", changed(properties={}))
    folder = Path(str(registry.resource("algorithms", "double")))
    (folder / "other.schema.json").write_text(json.dumps(other), encoding="utf-8")
    row = Entry("algorithms", "other", "third_party_quant.algorithm:Other", "third-party-quant", "1.2")
    registry = Registry((row, *registry.entries))
    assert load_document(parse_document(protocol("{type: other}")), registry).process[0].type == "other"


def test_the_whole_schema_refuses_entries_of_an_unusable_plugin_with_the_reason(install: Install) -> None:
    registry = install("double", changed(properties={}))
    schema = compose("modelslim_v1", registry)
    document = {
        "apiversion": "modelslim_v1",
        "spec": {"process": [{"type": "double"}], "save": [{"type": "ascendv1_saver"}]},
    }
    [error] = Draft7Validator(schema).iter_errors(document)
    assert isinstance(error.schema, dict)
    assert "third-party-quant 1.2" in error.schema["errorMessage"]


def test_an_incompatible_plugin_is_named_when_it_is_asked_for(registry: Registry) -> None:
    row = Entry("algorithms", "old", "old.algorithm:Old", "old-quant", "0.1", "incompatible", "needs modelslim<0.1")
    with pytest.raises(PluginError, match=r"old-quant 0\.1 is incompatible: needs modelslim<0\.1"):
        load_document(parse_document(protocol("{type: old}")), Registry((row, *registry.entries)))


def test_words_of_keywords_that_only_third_parties_use(install: Install) -> None:
    properties = {
        **KIND,
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "below": {"type": "number", "maximum": 1, "exclusiveMaximum": 1},
        "even": {"type": "integer", "multipleOf": 2},
        "few": {"type": "array", "maxItems": 2, "uniqueItems": True},
        "two": {"type": "array", "minItems": 2},
        "never": {"not": {}},
        "one": {"const": 1},
        "short": {"type": "string", "maxLength": 3, "pattern": "^a"},
        "either": {"type": ["string", "array"]},
        "named": {"type": "object", "patternProperties": {"^x": {}}, "additionalProperties": False},
        "own": {"type": "integer", "errorMessage": "count the layers"},
        "choice": {"enum": [1, None, True]},
        "pair": {"type": "array", "items": [{"type": "string"}, True], "minItems": 1},
        "free": True,
    }
    registry = install("double", changed(properties=properties))
    text = protocol(
        "{type: double, any: 5, below: 2, even: 3, few: [1, 1, 1], two: [1], never: x, one: 2, short: bcde, either: 1,"
        " named: {xy: 1, y: 1}, own: x, choice: 2, pair: [], free: 1}"
    )
    with pytest.raises(ProtocolError) as caught:
        load_document(parse_document(text), registry)
    found = [f"{item.path.removeprefix('spec.process[0].')}: {item.message}" for item in caught.value.diagnostics]
    assert found == [
        "any: 5 is not valid under any of the given schemas",
        "below: must be at most 1, not 2",
        "below: must be less than 1, not 2",
        "even: must be a multiple of 2, not 3",
        "few: must have at most 2 items, not 3",
        "few: [1, 1, 1] has non-unique elements",
        "two: must have at least 2 items, not 1",
        "never: 'x' is not allowed here",
        "one: must be 1, not 2",
        "short: must have at most 3 characters, not 4",
        "short: 'bcde' does not match the pattern ^a",
        "either: must be a string or a list, not 1",
        "named.y: unknown key 'y'",
        "own: count the layers",
        "choice: must be 1 or null or true, not 2",
        "pair: must not be empty",
    ]
