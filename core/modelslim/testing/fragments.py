# SPDX-License-Identifier: Apache-2.0
"""What a JSON Schema fragment says of an entry, beside what its plugin reads: keys and defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

Schema = Mapping[str, Any]
Keys = tuple[str | int, ...]


class Recorder(Mapping[str, Any]):
    """An entry that remembers which of its keys were asked for, with those of the mappings inside it.

    Attributes:
        asked: their paths; items of a list count as one and add nothing to the path.
    """

    def __init__(self, value: Mapping[str, Any], path: tuple[str, ...] = (), asked: set[Any] | None = None) -> None:
        self.asked: set[tuple[str, ...]] = set() if asked is None else asked
        self._value = value
        self._path = path

    def __getitem__(self, key: str) -> Any:
        self.asked.add((*self._path, key))
        return self._watched(self._value[key], (*self._path, key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def _watched(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return Recorder(value, path, self.asked)
        return [self._watched(item, path) for item in value] if isinstance(value, list) else value


def properties(root: Schema, node: Schema) -> dict[str, list[Schema]]:
    """The properties that an object may have, each with all that is said about it."""
    found: dict[str, list[Schema]] = {}
    for part in _parts(root, node):
        for name, value in part.get("properties", {}).items():
            found.setdefault(name, []).extend(_parts(root, value))
    return found


def unknown(root: Schema, asked: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Paths that lead to no property of the fragment."""
    return {path for path in asked if not _at(root, path)}


def given(root: Schema, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the keys of an entry that can tell a plugin something: which may have another value, too."""
    if isinstance(value, list):
        for item in value:
            yield from given(root, item, path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            here = (*path, key)
            if not any("const" in one or len(one.get("enum", "..")) == 1 for one in _at(root, here)):
                yield here
                yield from given(root, item, here)


def defaults(root: Schema, value: Any, node: Sequence[Schema], path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every default that the fragment states for an entry, with its path; also of objects that the entry lacks."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from defaults(root, item, _items(root, node), (*path, index))
        return
    if not isinstance(value, Mapping):
        return
    merged: dict[str, list[Schema]] = {}
    for one in node:
        for name, parts in properties(root, one).items():
            merged.setdefault(name, []).extend(parts)
    for name, parts in merged.items():
        for stated in {repr(part["default"]): part["default"] for part in parts if "default" in part}.values():
            yield (*path, name), stated
        if name in value or any("properties" in part for part in parts):
            yield from defaults(root, value.get(name, {}), parts, (*path, name))


def without(entry: Any, path: Keys) -> Any:
    """A copy without the key at the end of the path; what lies above it is there, empty if need be."""
    copy, parent = _opened(entry, path)
    parent.pop(path[-1], None)
    return copy


def replaced(entry: Any, path: Keys, value: Any) -> Any:
    """A copy with that value at the path."""
    copy, parent = _opened(entry, path)
    parent[path[-1]] = value
    return copy


def _opened(entry: Any, path: Keys) -> tuple[Any, Any]:
    copy = deepcopy(entry)
    parent = copy
    for key in path[:-1]:
        if isinstance(key, str):
            parent.setdefault(key, {})
        parent = parent[key]
    return copy, parent


def _at(root: Schema, path: Sequence[str]) -> list[Schema]:
    """All that the fragment says about a path."""
    nodes = _parts(root, root)
    for key in path:
        nodes = [part for node in nodes for part in properties(root, node).get(key, ())]
        nodes += _items(root, nodes)
    return nodes


def _items(root: Schema, nodes: Sequence[Schema]) -> list[Schema]:
    """What is said about the items of lists."""
    return [part for node in nodes if isinstance(node.get("items"), Mapping) for part in _parts(root, node["items"])]


def _parts(root: Schema, node: Schema) -> list[Schema]:
    """A schema with its references and alternatives, as a list."""
    while "$ref" in node:
        target: Any = root
        for key in node["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[key] if key else target
        node = target
    nested = [part for key in ("allOf", "anyOf", "oneOf") for one in node.get(key, ()) for part in _parts(root, one)]
    return [node, *nested]
