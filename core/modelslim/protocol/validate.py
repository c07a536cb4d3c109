# SPDX-License-Identifier: Apache-2.0
"""A document to a protocol: every mistake at once, each with its place and its remedy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelslim.errors import Diagnostic, PluginError, ProtocolError, closest, nearest
from modelslim.protocol.compose import KINDS, apiversions, compose, refuse_apiversion
from modelslim.protocol.document import Document, Steps, read_document
from modelslim.protocol.explain import Explainer
from modelslim.protocol.model import Processor, Protocol, SaverEntry, Stage
from modelslim.protocol.repair import Repair, repaired

if TYPE_CHECKING:
    from modelslim.registry import Registry

_APIVERSION = {"apiversion": "apiversion"}
_PLACES = {"processor": "process", "saver": "save"}


def load_protocol(path: str | Path, registry: Registry) -> Protocol:
    """Read and check a protocol.

    Args:
        path: the YAML file.
        registry: the installed plugins.

    Raises:
        ProtocolError: the file cannot be read, or is no protocol; carries every mistake found.
        PluginError: a plugin that the protocol names is installed but unusable.
    """
    return load_document(read_document(path), registry)


def load_document(document: Document, registry: Registry) -> Protocol:
    """Check a document; otherwise as :func:`load_protocol`."""
    protocol, found = check_document(document, registry)
    if protocol is None or found:
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise ProtocolError(f"{document.file} is not a valid protocol: {count}", diagnostics=found)
    return protocol


def read_protocol(path: str | Path, registry: Registry) -> tuple[Protocol | None, list[Diagnostic]]:
    """Read and check a protocol whose mistakes the caller reports together with others.

    Args:
        path: the YAML file.
        registry: the installed plugins.

    Returns:
        The protocol with misspelt names put right and without the entries that hold another mistake, None when
        nothing can be told from it; and the mistakes in the order of the file.

    Raises:
        ProtocolError: the file cannot be read as YAML.
        PluginError: a plugin that the protocol names is installed but unusable.
    """
    return check_document(read_document(path), registry)


def check_document(document: Document, registry: Registry) -> tuple[Protocol | None, list[Diagnostic]]:
    """Check a document; otherwise as :func:`read_protocol`.

    Misspelt names that are near to a right one are put right, and what they have hidden is told as well.
    """
    apiversion, problem = _apiversion(document)
    found = [] if problem is None else [problem]
    if not apiversion:
        return None, found
    if problem is not None:
        written = next(key for key in document.value if key == "apiversion" or closest(key, _APIVERSION))
        repairs = [Repair((written,), "apiversion", key=True), Repair((written,), apiversion)]
        document = repaired(document, repairs if written != "apiversion" else repairs[1:])
    protocol: Protocol | None = None
    while True:
        try:
            protocol, more, repairs = _check(document, apiversion, registry)
        except PluginError:
            if not found:
                raise
            break  # of a plugin that the file does not name yet
        found += more
        again = repaired(document, repairs)
        if again.value == document.value:
            break
        document = again
    # A mistake in an anchor is found once per alias; the first path stands for all.
    unique: dict[tuple[int | None, int | None, str], Diagnostic] = {}
    for diagnostic in found:
        unique.setdefault((diagnostic.line, diagnostic.column, diagnostic.message), diagnostic)
    ordered = sorted(unique.values(), key=lambda diagnostic: (diagnostic.line or 0, diagnostic.column or 0))
    return protocol, ordered


def _check(
    document: Document, apiversion: str, registry: Registry
) -> tuple[Protocol | None, list[Diagnostic], list[Repair]]:
    """The protocol without what is wrong; what is; and what puts names right."""
    schema = compose(apiversion, registry, types=_named_types(document.value))
    explainer = Explainer(document, schema, lambda title, name: _name_hint(registry, title, name))
    found: list[Diagnostic] = []
    wrong: set[Steps] = set()
    for error in schema_errors(schema, document.value):
        path = tuple(error.absolute_path)
        wrong.update(path[:length] for length in range(1, len(path) + 1))
        found += explainer.explain(error)
    found += _misplaced(document, schema, explainer)
    return _protocol(document, apiversion, schema, wrong), found, explainer.repairs


def _apiversion(document: Document) -> tuple[str, Diagnostic | None]:
    """The apiversion, without which nothing else can be judged, and what is wrong with it.

    Where it is misspelt, the one that is meant; empty where that cannot be told.
    """
    value = document.value
    supported = f"supported: {', '.join(apiversions())}"
    path = ("apiversion",)
    if not isinstance(value, dict):
        hint = "it begins with apiversion: modelslim_v1 and spec:"
        return "", document.diagnostic("a protocol must be a mapping", (), hint=hint)
    if "apiversion" not in value:
        line, column = document.position(())
        missing = Diagnostic("missing key 'apiversion'", "apiversion", document.file, line, column, supported)
        for key in value:
            if (hint := nearest(key, path)).startswith("did you mean"):
                meant = value[key] if value[key] in apiversions() else ""
                return meant, document.diagnostic(f"unknown key '{key}'", (key,), key=True, hint=hint)
        return "", missing
    apiversion = value["apiversion"]
    if not isinstance(apiversion, str):
        return "", document.diagnostic("must be a string", path, hint=supported)
    if refusal := refuse_apiversion(apiversion):
        meant = closest(apiversion, {name: name for name in apiversions()}) if "did you mean" in refusal[1] else ""
        return meant, document.diagnostic(refusal[0], path, hint=refusal[1])
    return apiversion, None


def _named_types(value: Any) -> set[str]:
    """Every ``type`` that the document names, wherever it stands."""
    names: set[str] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
            if isinstance(item.get("type"), str):
                names.add(item["type"])
        elif isinstance(item, list):
            pending.extend(item)
    return names


def schema_errors(schema: Mapping[str, Any], value: Any) -> Iterator[Any]:
    """jsonschema's errors; of a value of the wrong type only that it is."""
    import referencing
    from jsonschema import Draft7Validator, validators

    # Draft 7 takes 128.0 for an integer and has no word for infinity; a plugin should see neither.
    types = Draft7Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, item: isinstance(item, int) and not isinstance(item, bool),
            "number": lambda _, item: (
                isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
            ),
        }
    )
    validator = validators.extend(Draft7Validator, type_checker=types)  # type: ignore[no-untyped-call]
    # The empty registry keeps jsonschema from fetching references; compose leaves local ones only.
    errors = list(validator(schema, registry=referencing.Registry()).iter_errors(value))
    mistyped = {tuple(error.absolute_path) for error in errors if error.validator == "type"}
    return (error for error in errors if error.validator == "type" or tuple(error.absolute_path) not in mistyped)


def _misplaced(document: Document, schema: Mapping[str, Any], explainer: Explainer) -> Iterator[Diagnostic]:
    """Keys of the top level that would be ignored although they look like settings.

    Any key may stand there to hold anchors; one without an anchor that is called like a setting is a slip.
    """
    spec = schema["properties"]["spec"]["properties"]
    for key in document.value:
        if key in schema["properties"] or document.place((key,)).anchored:
            continue
        if key in spec:
            hint = "indent it below spec"
            yield document.diagnostic(f"key '{key}' has no effect at the top level", (key,), key=True, hint=hint)
        elif nearest(key, schema["properties"]).startswith("did you mean"):
            yield explainer.unknown_key((), key, schema["properties"])


def _name_hint(registry: Registry, title: str, name: str) -> str:
    if title not in KINDS:
        return ""
    for other, kind in KINDS.items():
        if name in registry.names(kind):
            return f"it is a {other} and belongs under {_PLACES[other]}"
    try:
        registry.schema(KINDS[title], name)
    except PluginError as error:
        return error.hint
    return ""


def _protocol(
    document: Document, apiversion: str, schema: Mapping[str, Any], wrong: Collection[Steps]
) -> Protocol | None:
    """The protocol without what lies at or above a path of ``wrong``; None without a usable ``spec``."""
    declared = schema["properties"]["spec"]["properties"]
    spec = document.value.get("spec")
    if not isinstance(spec, dict):
        return None

    def setting(key: str) -> Any:
        written = key in spec and ("spec", key) not in wrong
        return spec[key] if written else declared.get(key, {}).get("default")

    def entries(path: Steps, items: Any) -> Iterator[tuple[Steps, dict[str, Any]]]:
        for index, item in enumerate(items if isinstance(items, list) else ()):
            if (*path, index) not in wrong:
                yield (*path, index), item

    def processors(path: Steps, items: Any) -> tuple[Processor, ...]:
        return tuple(Processor(item["type"], item, place) for place, item in entries(path, items))

    metadata = document.value.get("metadata", {})
    return Protocol(
        apiversion=apiversion,
        runner=setting("runner"),
        prior=tuple(
            Stage(processors((*place, "process"), stage["process"]), stage.get("dataset"), place)
            for place, stage in entries(("spec", "prior"), spec.get("prior"))
        ),
        process=processors(("spec", "process"), spec.get("process")),
        save=tuple(
            SaverEntry(item["type"], item, place) for place, item in entries(("spec", "save"), spec.get("save"))
        ),
        dataset=setting("dataset"),
        experts=setting("experts"),
        propagation=setting("propagation"),
        default_text=setting("default_text"),
        metadata=metadata if ("metadata",) not in wrong else {},
        document=document,
    )
