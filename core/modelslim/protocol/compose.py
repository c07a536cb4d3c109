# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of an installation: an apiversion's base schema with the fragments of the installed plugins.

The base schemas are files of the package :mod:`modelslim.schemas`, one per apiversion. A plugin brings a
fragment: a self-contained draft-07 schema of its whole entry, with its name as ``const`` of ``type`` and
``additionalProperties: false``. It may point at any installed processor with ``urn:modelslim:processor``.
Beside a keyword, ``errorMessage`` (a string) replaces our words for a value that the keyword refuses.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from modelslim.errors import PluginError, ProtocolError, nearest
from modelslim.protocol.document import shorten

if TYPE_CHECKING:
    from modelslim.registry import Registry

PROCESSOR_URN = "urn:modelslim:processor"

KINDS = {"processor": "algorithms", "saver": "savers"}
"""What the protocol calls an entry, and the registry's kind that offers it."""

_SUFFIX = ".schema.json"
_CONVERSION = "modelslim_convert"
_UNSUPPORTED = frozenset({"modelslim_v0", "multimodal_sd_modelslim_v1"})


def apiversions() -> list[str]:
    """The apiversions that this version of ModelSlim reads, sorted."""
    files = resources.files("modelslim.schemas").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def refuse_apiversion(apiversion: str) -> tuple[str, str] | None:
    """Message and hint when ``apiversion`` cannot be read; None when it can."""
    known = apiversions()
    if apiversion in known:
        return None
    if apiversion == _CONVERSION:
        return f"apiversion '{apiversion}' is that of a conversion, which only `quant` takes", "see docs/convert.md"
    if apiversion in _UNSUPPORTED:
        supported = f"supported: {', '.join(known)}"
        return f"apiversion '{apiversion}' is not supported by this version of modelslim", supported
    return f"unknown apiversion '{shorten(apiversion)}'", nearest(apiversion, known)


def compose(apiversion: str, registry: Registry, types: Collection[str] | None = None) -> dict[str, Any]:
    """The JSON Schema (draft-07, without outside references) that a protocol must satisfy.

    Args:
        apiversion: one of :func:`apiversions`.
        registry: the installed plugins.
        types: take in the fragments of these processors and savers only, and refuse unusable ones. None:
            take in all; the entries of a plugin whose fragment is unusable are then refused by the schema.

    Raises:
        ProtocolError: the apiversion cannot be read.
        PluginError: a plugin of ``types`` is unusable; names the distribution.
    """
    if refusal := refuse_apiversion(apiversion):
        raise ProtocolError(refusal[0], hint=refusal[1])
    file = resources.files("modelslim.schemas") / f"{apiversion}{_SUFFIX}"
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    runner = schema["properties"]["spec"]["properties"]["runner"]
    if "enum" in runner:  # an apiversion with one runner takes any word, and the plan warns
        runner["enum"] += registry.names("runners")
    for noun, kind in KINDS.items():
        names = registry.names(kind)
        definition = schema["definitions"][noun]
        definition["properties"]["type"]["enum"] = names
        definition["allOf"] = []
        if types is not None:
            # Incompatible and duplicate plugins have rows but no usable name: asking for one says why.
            names = sorted({entry.name for entry in registry.entries if entry.kind == kind}.intersection(types))
        for name in names:
            key = f"{noun}.{name}"
            try:
                schema["definitions"][key] = _relocate(_fragment(registry, kind, name), _pointer(key))
            except PluginError as error:
                if types is not None:
                    raise
                schema["definitions"][key] = {"not": {}, "errorMessage": error.message}
            chosen = {"required": ["type"], "properties": {"type": {"const": name}}}
            definition["allOf"].append({"if": chosen, "then": {"$ref": _pointer(key)}})
    return schema


def _fragment(registry: Registry, kind: str, name: str) -> dict[str, Any]:
    """The plugin's fragment, checked for what composing and clear messages rely on."""
    fragment = registry.schema(kind, name)
    assert fragment is not None, "processors and savers are configured kinds"
    if flaw := _flaw(fragment, name):
        entry = next(entry for entry in registry.entries if (entry.kind, entry.name) == (kind, name))
        raise PluginError(
            f"the JSON Schema of {entry.label} of {entry.origin} is unusable: {flaw}",
            hint=f"the author of {entry.distribution} repairs {name}{_SUFFIX}",
        )
    return fragment


def _flaw(fragment: dict[str, Any], name: str) -> str:
    """What is wrong with a fragment; empty when nothing is."""
    from jsonschema import Draft7Validator, SchemaError
    from referencing import Registry as Resources
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT7

    try:
        Draft7Validator.check_schema(fragment)
    except SchemaError as error:
        return f"not a draft-07 schema: {error.message}"
    kind = fragment.get("properties", {}).get("type")
    if not isinstance(kind, dict) or kind.get("const") != name:
        return f"its property 'type' must have the const {name!r}"
    if fragment.get("type") != "object" or "type" not in fragment.get("required", []):
        return "it must be of type object and require 'type'"
    if fragment.get("additionalProperties") is not False:
        return "it must set additionalProperties to false, or misspelt keys would pass"
    known = [("", DRAFT7.create_resource(fragment)), (PROCESSOR_URN, DRAFT7.create_resource({}))]
    resolver = Resources().with_resources(known).resolver()
    for keyword, value in _strings(fragment):
        if keyword == "$id" and value != fragment.get("$id"):
            return f"$id {value!r} below the top would change what its references mean"
        if keyword == "$ref":
            try:
                resolver.lookup(value)
            except Unresolvable:
                return f"$ref {value!r} leads nowhere"
            if not value.startswith("#") and value != PROCESSOR_URN:
                return f"$ref {value!r} must start with '#' or be {PROCESSOR_URN}"
    return ""


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Every key with a string value, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield key, item
            else:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _relocate(fragment: dict[str, Any], pointer: str) -> dict[str, Any]:
    """A copy of the fragment whose references hold when it lies at ``pointer`` of a larger schema."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: target(item) if key == "$ref" and isinstance(item, str) else moved(item) for key, item in value.items()
        }

    def target(reference: str) -> str:
        return "#/definitions/processor" if reference == PROCESSOR_URN else pointer + reference[1:]

    return {key: value for key, value in moved(fragment).items() if key not in ("$schema", "$id")}


def _pointer(key: str) -> str:
    from urllib.parse import quote

    return "#/definitions/" + quote(key.replace("~", "~0").replace("/", "~1"), safe="~")
