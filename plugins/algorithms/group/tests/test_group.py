# SPDX-License-Identifier: Apache-2.0
"""What a group stands for, and what its schema fragment accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft7Validator
from referencing import Registry
from referencing.jsonschema import DRAFT7

from modelslim.api import Algorithm, Processor
from modelslim_group.algorithm import Group

SCHEMA: dict[str, Any] = json.loads(
    (resources.files("modelslim_group") / "group.schema.json").read_text(encoding="utf-8")
)
# What an installed processor looks like, in place of those that the core would put here.
PROCESSOR = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["leaf", "group"]}}}


def group(*members: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "group", "configs": list(members)}


def leaf(number: int) -> dict[str, Any]:
    return {"type": "leaf", "number": number}


def unfold(config: Mapping[str, Any], place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Places and numbers of the leaves, the way a plan finds them: groups expanded until none is left."""
    for inner, member in Group.expand(config):
        if member["type"] == "group":
            yield from unfold(member, (*place, *inner))
        else:
            yield (*place, *inner), member["number"]


def look_up(config: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        config = config[step]
    return config


def test_members_come_in_their_order_with_their_places() -> None:
    members = Group.expand(group(leaf(1), leaf(2)))
    assert list(members) == [(("configs", 0), leaf(1)), (("configs", 1), leaf(2))]


def test_nested_groups_unfold_in_the_order_of_the_document() -> None:
    config = group(leaf(1), group(leaf(2), group(leaf(3)), leaf(4)), leaf(5))
    found = list(unfold(config))
    assert [number for _, number in found] == [1, 2, 3, 4, 5]
    assert found[2][0] == ("configs", 1, "configs", 1, "configs", 0)
    assert all(look_up(config, place)["number"] == number for place, number in found)


def test_group_is_no_algorithm_that_could_be_applied() -> None:
    assert issubclass(Group, Processor)
    assert not issubclass(Group, Algorithm)


def refusals(value: Mapping[str, Any]) -> list[str]:
    known = Registry().with_resource("urn:modelslim:processor", DRAFT7.create_resource(PROCESSOR))
    errors = Draft7Validator(SCHEMA, registry=known).iter_errors(value)
    return sorted(".".join(map(str, error.absolute_path)) for error in errors)


def test_schema_accepts_groups_in_groups() -> None:
    assert refusals(group(leaf(1), group(leaf(2)))) == []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"type": "group"}, ""),
        ({"type": "groups", "configs": [leaf(1)]}, "type"),
        ({"type": "group", "configs": [leaf(1)], "include": ["*"]}, ""),
        (group(), "configs"),
        ({"type": "group", "configs": leaf(1)}, "configs"),
        (group(leaf(1), {"number": 2}), "configs.1"),
        (group(leaf(1), {"type": "unknown"}), "configs.1.type"),
    ],
)
def test_schema_refuses_a_group_that_means_nothing(value: Mapping[str, Any], place: str) -> None:
    assert refusals(value) == [place]


def test_every_property_is_described() -> None:
    assert all(value["description"] for value in SCHEMA["properties"].values())
