# SPDX-License-Identifier: Apache-2.0
"""What jsonschema found, in plain words and with the place in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelslim.errors import Diagnostic, closest, nearest
from modelslim.protocol.document import Document, Steps, format_path, shorten
from modelslim.protocol.nodes import equals_hint
from modelslim.protocol.repair import Repair

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a string",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "empty",
}
_YAML_1_1_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_LIMITS = {
    "minimum": "must be at least {}",
    "maximum": "must be at most {}",
    "exclusiveMinimum": "must be more than {}",
    "exclusiveMaximum": "must be less than {}",
    "multipleOf": "must be a multiple of {}",
}
_SIZES = {
    "minLength": ("must have at least {} characters", "must not be empty"),
    "maxLength": ("must have at most {} characters", ""),
    "minItems": ("must have at least {} items", "must not be empty"),
    "maxItems": ("must have at most {} items", ""),
}


class Explainer:
    """Turns errors of one document against one schema into diagnostics.

    Attributes:
        document: the document.
        schema: what compose gave.
        name_hint: hint for an unknown name, from what it should name (such as ``processor``) and the name.
        repairs: what would put names right that were explained as misspelt.
    """

    def __init__(self, document: Document, schema: Mapping[str, Any], name_hint: Callable[[str, str], str]) -> None:
        from referencing import Registry as Resources
        from referencing.jsonschema import DRAFT7

        self.document = document
        self.schema = schema
        self.resolver = Resources().with_resource("", DRAFT7.create_resource(schema)).resolver()
        self.name_hint = name_hint
        self.repairs: list[Repair] = []

    @property
    def _settings(self) -> Mapping[Any, Any]:
        """What ``spec`` of a protocol declares; nothing in a document that has no such key."""
        declared: Mapping[Any, Any] = self.schema["properties"].get("spec", {}).get("properties", {})
        return declared

    def explain(self, error: ValidationError) -> Iterator[Diagnostic]:
        """The diagnostics of one error; several for unknown or missing keys."""
        path: Steps = tuple(error.absolute_path)
        schema: Any = error.schema  # that holds the keyword; False where a key is forbidden
        value: Any = error.instance
        if error.validator == "additionalProperties" and error.validator_value is False:
            for key in value:
                if not _declared(schema, key):
                    yield self.unknown_key(path, key, schema.get("properties", {}))
        elif error.validator == "required":
            yield from self._missing_keys(path, error)
        else:
            message, hint = self._words(error)
            if isinstance(schema, Mapping) and isinstance(schema.get("errorMessage"), str):
                message, hint = schema["errorMessage"], ""
            if error.validator == "minItems" and path:
                hint = self._choices(self._settings.get(path[-1], {})) or hint
            yield self.document.diagnostic(message, path, hint=hint)

    def unknown_key(self, path: Steps, key: str, properties: Iterable[str]) -> Diagnostic:
        """Says that the mapping at ``path`` has no key ``key``, since it has only ``properties``."""
        name, colon, value = key.partition(":")
        if colon and name in properties:
            hint = f"a blank belongs behind the colon: {name}: {shorten(value)}"
        else:
            hint = nearest(key, properties) or "the mapping takes no keys"
            if right := closest(key, {name: name for name in properties}):
                self.repairs.append(Repair((*path, key), right, key=True))
        return self.document.diagnostic(f"unknown key {_show(key)}", (*path, key), key=True, hint=hint)

    def _missing_keys(self, path: Steps, error: ValidationError) -> Iterator[Diagnostic]:
        schema: Any = error.schema
        properties = schema.get("properties", {})
        value: Any = error.instance
        required: Any = error.validator_value
        undeclared = [key for key in value if not _declared(schema, key)]
        for key in required:
            if key in value:
                continue
            # A misspelt key is one mistake, not an unknown key and a missing one.
            misspelt = [other for other in undeclared if nearest(other, properties) == f"did you mean {key!r}?"]
            if misspelt:
                yield self.unknown_key(path, misspelt[0], properties)
                continue
            declaration = properties.get(key, {})
            hint = self._choices(declaration) or self._resolved(declaration).get("description", "").rstrip(".")
            line, column = self.document.position(path, key=True)
            place = format_path((*path, key))
            yield Diagnostic(f"missing key {_show(key)}", place, self.document.file, line, column, hint)

    def _words(self, error: ValidationError) -> tuple[str, str]:
        """Message and hint for an error of one value."""
        value: Any = error.instance
        limit: Any = error.validator_value
        keyword = str(error.validator)
        schema: Any = error.schema
        if error.validator is None or keyword == "not":
            return f"{_show(value)} is not allowed here", ""
        if keyword == "type":
            return _wrong_type(value, [limit] if isinstance(limit, str) else limit, schema)
        if keyword == "enum":
            names = [item for item in limit if isinstance(item, str)]
            hint = nearest(value, names) if isinstance(value, str) else ""
            if isinstance(value, str) and (right := closest(value, {name: name for name in names})):
                self.repairs.append(Repair(tuple(error.absolute_path), right))
            if title := schema.get("title"):
                return f"unknown {title} {_show(value)}", self.name_hint(title, str(value)) or hint
            allowed = " or ".join(_show(item) for item in limit)
            return f"must be {allowed}, not {_show(value)}", hint if hint.startswith("did you mean") else ""
        if keyword == "const":
            return f"must be {_show(limit)}, not {_show(value)}", ""
        if keyword in _LIMITS:
            return f"{_LIMITS[keyword].format(limit)}, not {_show(value)}", ""
        if keyword in _SIZES:
            few, empty = _SIZES[keyword]
            return empty if empty and limit == 1 else f"{few.format(limit)}, not {len(value)}", ""
        if keyword == "pattern":
            return f"{_show(value)} does not match the pattern {limit}", ""
        # A keyword that only foreign fragments use; jsonschema quotes the whole value.
        return error.message if len(error.message) <= 200 else f"{error.message[:197]}...", ""

    def _choices(self, declaration: Any) -> str:
        """``installed savers: ...`` where a list of plugin entries, or the type of one, is declared; else empty."""
        entry = self._resolved(self._resolved(declaration).get("items", {}))
        kind = self._resolved(entry.get("properties", {}).get("type", declaration))
        known = "title" in kind and "enum" in kind
        return f"installed {kind['title']}s: {', '.join(kind['enum']) or 'none'}" if known else ""

    def _resolved(self, declaration: Any) -> Any:
        """What a declaration stands for, since compose leaves references to other parts of the schema in it."""
        if not isinstance(declaration, Mapping):  # true, or the items of a tuple
            return {}
        return self.resolver.lookup(declaration["$ref"]).contents if "$ref" in declaration else declaration


def _declared(schema: Mapping[str, Any], key: str) -> bool:
    return key in schema.get("properties", {}) or any(
        re.search(pattern, key) for pattern in schema.get("patternProperties", {})
    )


def _wrong_type(value: Any, wanted: Sequence[str], schema: Mapping[str, Any]) -> tuple[str, str]:
    article = " or ".join(_TYPES[kind] for kind in wanted)
    if value is None:
        below = not {"object", "array"}.isdisjoint(wanted)
        return f"must be {article}, but is empty", "indent what belongs to the key below it" if below else ""
    hint = ""
    if isinstance(value, str):
        if "array" in wanted:
            hint = f'write a list: ["{shorten(value)}"]'
        elif "object" in wanted:
            known = schema.get("properties", {}).get("type", {}).get("enum", ())
            hint = equals_hint(value[:200]) or (f'write type: "{value}"' if value in known else "")
        elif "boolean" in wanted:
            word = _YAML_1_1_BOOLEANS.get(value.casefold(), value.casefold())
            hint = f"write {word}, without quotes" if word in ("true", "false") else ""
        elif re.fullmatch(r"[-+]?[0-9]{1,20}(\.[0-9]{1,20})?", value):
            hint = f"write {value}, without quotes"
        elif number := re.match(r"[0-9]{1,20}(?= ?[A-Za-z]{1,3}$)", value):
            hint = f"write {number[0]}, without a unit"
    elif isinstance(value, dict) and "array" in wanted:
        hint = "start each item with '- '"
    elif isinstance(value, list) and "object" in wanted:
        hint = "write its keys without '- ' before them"
    elif "string" in wanted and not isinstance(value, (dict, list)):
        known = [item for item in schema.get("enum", ()) if isinstance(item, str)]
        hint = nearest(_show(value), known) or "put it into quotes"
    elif "integer" in wanted and isinstance(value, float) and value.is_integer():
        hint = f"write {int(value)}"
    return f"must be {article}, not {'the string ' if isinstance(value, str) else ''}{_show(value)}", hint


def _show(value: Any) -> str:
    """A value as YAML writes it, or what it is when it holds others."""
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
