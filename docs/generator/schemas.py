# SPDX-License-Identifier: Apache-2.0
"""The reference of the keys of YAML and JSON files, from their JSON Schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from generator.words import code, heading, row, rows
from modelslim.protocol.compose import KINDS, apiversions, compose
from modelslim.registry import Registry

Schema = Mapping[str, Any]

_OPEN = ("processor", "saver")
"""Definitions that installed plugins fill."""

_LIMITS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
}
_HEAD = ("key", "value", "default", "meaning")


def protocol_page(registry: Registry) -> str:
    """The keys of a protocol with the processors and savers that ship, of a tune's plan, and of an engine contract."""
    lines = [
        heading(1, "Keys of YAML files"),
        "`modelslim schema` prints the JSON Schema of a protocol with the plugins that are installed. What the keys",
        "are for: [the YAML protocol](../protocol.md). `[]` stands for each element of a list, `*` for any name.",
        "",
    ]
    for apiversion in apiversions():
        lines += [*_section(apiversion, compose(apiversion, registry, types=()), 2), ""]
    for noun, kind in KINDS.items():
        lines += [heading(2, f"Each {noun}"), f"An entry whose `type` is the name of one of these {kind}.", ""]
        for name in registry.names(kind):
            schema = registry.schema(kind, name)
            assert schema is not None, "the protocol configures these kinds"
            lines += [*_section(name, schema, 3), ""]
    lines += [*_section("Plan of a tune", _shipped("tune_plan.json"), 2), ""]
    lines += _section("Engine contract", _shipped("engine_contract.json"), 2)
    return "\n".join(lines) + "\n"


def _shipped(name: str) -> Schema:
    found: Schema = json.loads(files("modelslim.schemas").joinpath(name).read_text(encoding="utf-8"))
    return found


def _section(title: str, schema: Schema, level: int) -> Iterator[str]:
    yield heading(level, title)
    yield schema.get("description", "")
    yield ""
    yield from rows(_HEAD, _keys(schema, schema, ""))
    said = [*dict.fromkeys(_refusals(schema))]
    if said:
        yield "\nRefused, in these words:\n"
        yield from (f"- {one}" for one in said)


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema with what its reference points at."""
    pointer = schema.get("$ref", "")
    if not pointer.startswith("#/"):
        return schema
    found = root
    for part in pointer[2:].split("/"):
        found = found[part]
    return {**_resolved(found, root), **{key: value for key, value in schema.items() if key != "$ref"}}


def _keys(schema: Schema, root: Schema, path: str) -> Iterator[str]:
    """A row for each key below, those of the alternatives of an object under the word that chooses them."""
    for name, reference in schema.get("properties", {}).items():
        found = _resolved(reference, root)
        below = f"{path}.{name}" if path else name
        required = "required" if name in schema.get("required", ()) else ""
        default = code(json.dumps(found["default"], ensure_ascii=False)) if "default" in found else required
        yield row(code(below), _value(found, root), default, found.get("description", ""))
        if not _is_open(reference):
            yield from _keys(found, root, below)
    for name, reference in [("*", schema.get("additionalProperties")), ("[]", schema.get("items"))]:
        if isinstance(reference, dict) and not _is_open(reference):
            below = f"{path}[]" if name == "[]" else f"{path}.*"
            yield from _keys(_resolved(reference, root), root, below)
    for one in schema.get("anyOf", ()):
        yield from _keys(_resolved(one, root), root, path)
    for choice in schema.get("allOf", ()):
        chosen = choice.get("if", {}).get("properties", {}).get("type", {}).get("const")
        if chosen is not None:
            yield from _keys(_resolved(choice["then"], root), root, f"{path}({chosen})")


def _is_open(schema: Schema) -> bool:
    """True where any installed plugin may stand."""
    pointer = schema.get("$ref", "")
    return pointer.startswith("urn:") or pointer.rpartition("/")[2] in _OPEN


def _value(schema: Schema, root: Schema) -> str:
    """What values there are, in words."""
    if _is_open(schema):
        return "processor"
    if "const" in schema:
        return code(json.dumps(schema["const"]).strip('"'))
    if "enum" in schema:
        return ", ".join(code(json.dumps(one).strip('"')) for one in schema["enum"])
    choices = [_value(_resolved(one, root), root) for one in schema.get("anyOf", ())]
    if choices:
        return " or ".join(choices)
    named = schema.get("type", "any")
    words = " or ".join([named] if isinstance(named, str) else named)
    words = words.replace("array", "list").replace("object", "mapping")
    if named == "array" and isinstance(schema.get("items"), dict):
        pointer = schema["items"].get("$ref", "").rpartition("/")[2]
        inner = pointer if pointer in _OPEN else _value(_resolved(schema["items"], root), root)
        words += f" of {inner}"
    return " ".join([words, *(text.format(schema[key]) for key, text in _LIMITS.items() if key in schema)])


def _refusals(schema: Any) -> Iterator[str]:
    """The sentences with which the schema refuses values."""
    if isinstance(schema, dict):
        if isinstance(schema.get("errorMessage"), str):
            yield schema["errorMessage"]
        for one in schema.values():
            yield from _refusals(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from _refusals(one)
