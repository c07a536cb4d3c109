# SPDX-License-Identifier: Apache-2.0
"""The plan of a tune: YAML, checked against its schema, and the protocols in it against theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from modelslim.errors import Diagnostic, ProtocolError, nearest
from modelslim.protocol.document import Document, Place, Steps, read_document
from modelslim.protocol.explain import Explainer
from modelslim.protocol.validate import check_document, schema_errors
from modelslim.registry import Registry

FLOAT = "float"
"""The option that leaves a group alone."""

SCHEMA = "tune_plan.json"


@dataclass(frozen=True)
class TunePlan:
    """What the YAML says.

    Attributes:
        document: the file with its positions.
        strategy: its ``strategy``, defaults filled in.
        evaluation: its ``evaluation``, defaults filled in.
        max_trials: trials at most.
        keep_checkpoints: True to keep the checkpoint of every trial.
        base: directory of the file, where relative paths are tried.
    """

    document: Document
    strategy: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    max_trials: int
    keep_checkpoints: bool
    base: Path

    def part(self, path: Steps) -> tuple[Any, Place]:
        """A value of the document, and its place."""
        return _part(self.document, path)

    def protocol(self, value: Mapping[str, Any], root: Place) -> Document:
        """A protocol made of parts of the plan; mistakes in it are told at their places in the file."""
        return Document(self.document.file, value, root)


def read_tune_plan(path: Path, registry: Registry) -> TunePlan:
    """Read and check a plan.

    Args:
        path: the YAML file.
        registry: the installed plugins.

    Raises:
        ProtocolError: it cannot be read, or is wrong; carries every mistake found.
        PluginError: a plugin that it names is installed but unusable.
    """
    document = read_document(path)
    schema = json.loads((resources.files("modelslim.schemas") / SCHEMA).read_text(encoding="utf-8"))
    found: list[Diagnostic] = []
    if not isinstance(document.value, dict):
        found.append(document.diagnostic("a plan must be a mapping", (), hint="it has strategy: and evaluation:"))
        raise _refusal(path, found)
    explainer = Explainer(document, schema, lambda title, name: "")
    for error in schema_errors(schema, document.value):
        found += explainer.explain(error)
    found += _unknown_keys(document, schema)
    if not found:
        plan = _filled(document, schema, path.parent)
        found += _conflicts(plan)
        for protocol in protocols(plan):
            found += check_document(protocol, registry)[1]
    if found:
        raise _refusal(path, found)
    return plan


def protocols(plan: TunePlan) -> Iterator[Document]:
    """The protocols that the plan is made of, as far as they stand in it: one with each front or all options."""
    strategy = plan.strategy
    if strategy["type"] == "standing_high_with_experience":
        save, place = plan.part(("strategy", "save"))
        for front, front_place in _fronts(plan):
            probe = {"type": "linear_quant", "qconfig": {"weight": {}}}
            process = [*front, probe]
            spec = {"process": process, "save": save}
            children: dict[str | int, Place] = {"process": front_place, "save": place}
            value = {"apiversion": "modelslim_v1", "spec": spec}
            yield plan.protocol(value, Place(place.value, children={"spec": Place(place.value, children=children)}))
        return
    template, root = plan.part(("strategy", "template"))
    if strategy["type"] == "budget":
        options, place = plan.part(("strategy", "options"))
        chosen = {index: one for index, one in enumerate(options) if one != FLOAT}
        yield plan.protocol(*with_process(template, root, list(chosen.values()), [place.children[i] for i in chosen]))
    elif strategy["type"] == "standing_high":
        for front, front_place in _fronts(plan):
            places = [front_place.children[index] for index in range(len(front))]
            yield plan.protocol(*with_process(template, root, front, places, front=True))
    else:
        yield plan.protocol(template, root)


def with_process(
    template: Any, root: Place, entries: Sequence[Any], places: Sequence[Place], front: bool = False
) -> tuple[Any, Place]:
    """A template with further entries of ``process``, in front of its own or behind them."""
    spec = template.get("spec") if isinstance(template, dict) else None
    if not isinstance(spec, dict) or not isinstance(spec.get("process", []), list):
        return template, root
    own = spec.get("process", [])
    spec_place = root.children["spec"]
    before = spec_place.children.get("process", Place(spec_place.value))
    own_places = [before.children[index] for index in range(len(own))]
    process = [*entries, *own] if front else [*own, *entries]
    all_places = [*places, *own_places] if front else [*own_places, *places]
    process_place = replace(before, children=dict(enumerate(all_places)))
    spec_place = replace(spec_place, children={**spec_place.children, "process": process_place})
    value = {**template, "spec": {**spec, "process": process}}
    return value, replace(root, children={**root.children, "spec": spec_place})


def _fronts(plan: TunePlan) -> Iterator[tuple[Sequence[Any], Place]]:
    """Each list of anti_outlier_strategies with its place."""
    if "anti_outlier_strategies" not in plan.document.value["strategy"]:
        yield [], Place(plan.part(("strategy",))[1].value)
        return
    fronts, place = plan.part(("strategy", "anti_outlier_strategies"))
    for index, front in enumerate(fronts):
        yield front, place.children[index]


def _conflicts(plan: TunePlan) -> Iterator[Diagnostic]:
    """What the schema cannot say."""
    strategy = plan.strategy
    if strategy["type"] != "budget" and "target" not in plan.evaluation:
        line, column = plan.document.position(("evaluation",), key=True)
        yield Diagnostic(
            "missing key 'target'", "evaluation.target", plan.document.file, line, column,
            f"{strategy['type']} looks for the protocol with the least in float that reaches a target",
        )  # fmt: skip
    if strategy["type"] == "budget":
        for index, option in enumerate(strategy["options"]):
            for key in ("include", "exclude"):
                if option != FLOAT and key in option:
                    path = ("strategy", "options", index, key)
                    hint = f"say it in strategy.{key}"
                    yield plan.document.diagnostic(f"an option has no {key} of its own", path, key=True, hint=hint)


def _unknown_keys(document: Document, schema: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Keys of the top level may hold anchors; one that is called like a setting is a slip."""
    for key in document.value:
        if key not in schema["properties"] and not document.place((key,)).anchored:
            hint = nearest(key, schema["properties"])
            yield document.diagnostic(f"unknown key '{key}'", (key,), key=True, hint=hint)


def _filled(document: Document, schema: Mapping[str, Any], base: Path) -> TunePlan:
    """The plan with the defaults of the schema."""
    definitions = schema["definitions"]
    names = {"standing_high_with_experience": "experience"}

    def filled(value: Mapping[str, Any]) -> dict[str, Any]:
        properties = definitions[names.get(value["type"], value["type"])]["properties"]
        resolved = {
            key: definitions[one["$ref"].rpartition("/")[2]] if "$ref" in one else one
            for key, one in properties.items()
        }
        return {**{key: one["default"] for key, one in resolved.items() if "default" in one}, **value}

    value = document.value
    return TunePlan(
        document,
        filled(value["strategy"]),
        filled(value["evaluation"]),
        value.get("max_trials", schema["properties"]["max_trials"]["default"]),
        value.get("keep_checkpoints", False),
        base,
    )


def _part(document: Document, path: Steps) -> tuple[Any, Place]:
    value = document.value
    for step in path:
        value = value[step]
    return value, document.place(path)


def _refusal(path: Path, found: Sequence[Diagnostic]) -> ProtocolError:
    unique = {(one.line, one.column, one.message): one for one in reversed(found)}
    ordered = sorted(unique.values(), key=lambda one: (one.line or 0, one.column or 0))
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
    return ProtocolError(f"{path} is not a valid plan of a tune: {count}", diagnostics=ordered)
