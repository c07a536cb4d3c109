# SPDX-License-Identifier: Apache-2.0
"""A YAML document as plain values that remember where they stand in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modelslim.errors import Diagnostic, ProtocolError
from modelslim.protocol.nodes import MAX_DEPTH, MAX_NODES, TOO_DEEP, compose, equals_hint
from modelslim.protocol.scalars import resolve

MAX_BYTES = 1 << 20
"""Largest protocol that is read; people write a few KiB."""

Position = tuple[int, int]
"""Line and column, counted from 1."""
Steps = tuple[str | int, ...]
"""Keys and indices from the top of a document to a value."""


@dataclass(frozen=True)
class Place:
    """Where a value stands.

    Attributes:
        value: its first character, that of its anchor if it has one; behind an alias, where the anchor stands.
        key: first character of its key; None for list items and the whole document.
        anchored: True when it, or something inside it, carries an anchor.
        children: places of what it holds.
    """

    value: Position
    key: Position | None = None
    anchored: bool = False
    children: Mapping[str | int, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One YAML document.

    Attributes:
        file: name of its file, for diagnostics.
        value: dict, list, str, int, float, bool or None, by the YAML 1.2 core schema; merge keys
            and aliases are expanded.
        root: the places of the values.
        text: what the file holds.
    """

    file: str
    value: Any
    root: Place
    text: str = ""

    def place(self, path: Sequence[str | int]) -> Place:
        """Place of a value; of its nearest ancestor in the file when it is not written there."""
        place = self.root
        for step in path:
            if step not in place.children:
                return place
            place = place.children[step]
        return place

    def position(self, path: Sequence[str | int], key: bool = False) -> Position:
        """Line and column of a value.

        Args:
            path: keys and indices from the top.
            key: point at its key instead, where it has one.
        """
        place = self.place(path)
        return place.key if key and place.key else place.value

    def diagnostic(self, message: str, path: Sequence[str | int], *, key: bool = False, hint: str = "") -> Diagnostic:
        """A diagnostic about the value at ``path``; arguments as in :meth:`position`."""
        line, column = self.position(path, key)
        return Diagnostic(message, format_path(path), self.file, line, column, hint)


def format_path(path: Sequence[str | int]) -> str:
    """``("spec", "process", 0, "type")`` as ``spec.process[0].type``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step and all(character.isalnum() or character in "_-" for character in step):
            text += f".{step}" if text else step
        else:
            text += f'["{shorten(step)}"]'
    return text


def shorten(text: str) -> str:
    """``text`` cut where a message would become unreadable, without control characters."""
    shown = "".join(character if character.isprintable() else " " for character in text[:61])
    return f"{shown[:57]}..." if len(shown) > 60 else shown


def read_document(path: str | Path) -> Document:
    """Read a file.

    Raises:
        ProtocolError: it cannot be opened, is larger than ``MAX_BYTES``, is not UTF-8, or what
            :func:`parse_document` refuses.
    """
    file = str(path)
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ProtocolError(
            f"{file} cannot be read", diagnostics=[Diagnostic(reason[:1].lower() + reason[1:], file=file)]
        ) from error
    if len(data) > MAX_BYTES:
        diagnostic = Diagnostic(f"the file is larger than {MAX_BYTES >> 20} MiB", file=file, hint="is it a protocol?")
        raise ProtocolError(f"{file} cannot be read", diagnostics=[diagnostic])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{file} cannot be read", diagnostics=[_not_utf8(file, data, error)]) from error
    return parse_document(text, file)


def parse_document(text: str, file: str = "<string>") -> Document:
    """Read a text.

    Args:
        text: the YAML text.
        file: its name for diagnostics.

    Raises:
        ProtocolError: not YAML, not one document, a key that is no string or comes twice, a tag, an
            alias that holds itself, or too much of anything.
    """
    if len(text) > MAX_BYTES:
        diagnostic = Diagnostic(f"the text is longer than {MAX_BYTES:,} characters", file=file)
        raise ProtocolError(f"{file} cannot be read", diagnostics=[diagnostic])
    composed = compose(text, file)
    builder = _Builder(file, composed.anchored)
    value, root = builder.build(composed.root, (), None)
    if builder.found:
        found = sorted(builder.found.values(), key=lambda diagnostic: (diagnostic.line or 0, diagnostic.column or 0))
        raise ProtocolError(f"{file} cannot be read as a protocol", diagnostics=found)
    return Document(file, value, root, text)


def _not_utf8(file: str, data: bytes, error: UnicodeDecodeError) -> Diagnostic:
    before = data[: error.start]
    line = before.count(b"\n") + 1
    column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8-sig")) + 1
    message = f"the byte 0x{data[error.start]:02x} is not UTF-8"
    return Diagnostic(message, file=file, line=line, column=column, hint="save the file as UTF-8")


def _position(mark: yaml.Mark) -> Position:
    return mark.line + 1, mark.column + 1


def _quoted(node: yaml.Node) -> bool:
    """True for a scalar in quotes or in block style, which is a string whatever it looks like."""
    return isinstance(node, yaml.ScalarNode) and node.style is not None


class _Builder:
    """Nodes to values and places; collects what is wrong on the way."""

    def __init__(self, file: str, anchored: frozenset[int]) -> None:
        self.file = file
        self.anchored = anchored
        # Keyed by place: a mistake in an anchor is met once per alias and reported once.
        self.found: dict[tuple[Position, str], Diagnostic] = {}
        self.left = MAX_NODES
        self.open: set[int] = set()

    def build(self, node: yaml.Node, path: Steps, key: Position | None) -> tuple[Any, Place]:
        """Value and place of a node; ``key`` is the position of its key."""
        self.left -= 1
        if self.left < 0:
            raise self._limit(f"aliases expand the document to more than {MAX_NODES:,} values", node, path)
        if id(node) in self.open:
            self._report("the anchor holds an alias of itself", node, path)
            return None, Place(_position(node.start_mark), key)
        if len(self.open) == MAX_DEPTH and not isinstance(node, yaml.ScalarNode):
            raise self._limit(TOO_DEEP, node, path)
        self.open.add(id(node))
        value: Any
        children: dict[str | int, Place] = {}
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, path, children)
        elif isinstance(node, yaml.SequenceNode):
            value = []
            for index, item in enumerate(node.value):
                built, children[index] = self.build(item, (*path, index), None)
                value.append(built)
        else:
            value = self._scalar(node, path)
        self.open.remove(id(node))
        anchored = id(node) in self.anchored or any(child.anchored for child in children.values())
        return value, Place(_position(node.start_mark), key, anchored, children)

    def _mapping(self, node: yaml.MappingNode, path: Steps, children: dict[str | int, Place]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            key = self._key(key_node, value_node, path)
            if key is None:
                continue
            if key in first:
                message = f"key '{shorten(key)}' is written already on line {first[key].start_mark.line + 1}"
                hint = "merge several mappings with <<: [*a, *b]" if key == "<<" else "keep one of them"
                self._report(message, key_node, (*path, key), hint)
                continue
            first[key] = key_node
            if key == "<<" and not _quoted(key_node):
                merged.append(value_node)
                continue
            value[key], children[key] = self.build(value_node, (*path, key), _position(key_node.start_mark))
        # What a mapping says itself wins over what it merges, wherever the merge stands.
        for source in (source for merge in merged for source in self._merge_sources(merge, path)):
            other, place = self.build(source, path, None)
            for name, child in place.children.items():
                if name not in value:
                    value[str(name)], children[name] = other[name], child
        return value

    def _merge_sources(self, node: yaml.Node, path: Steps) -> Iterator[yaml.Node]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                yield source
            else:
                self._report("'<<' merges mappings only", source, (*path, "<<"), "write <<: *anchor_of_a_mapping")

    def _key(self, node: yaml.Node, value: yaml.Node, path: Steps) -> str | None:
        """The key, or None when it was reported."""
        if not isinstance(node, yaml.ScalarNode):
            self._report("a key must be a string, not a mapping or a list", node, path)
            return None
        key = self._scalar(node, path)
        if not isinstance(key, str):
            word = shorten(node.value)
            self._report(f"the key {word or '(empty)'} is not a string", node, path, f'write "{word}":')
            return None
        if not _quoted(node) and isinstance(value, yaml.ScalarNode) and not value.value and (hint := equals_hint(key)):
            self._report(hint, node, path)
            return None
        return key

    def _scalar(self, node: yaml.Node, path: Steps) -> Any:
        text: str = node.value
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self._report("the escape is half of a surrogate pair, which is no character", node, path)
            return ""
        if _quoted(node):
            return text
        try:
            return resolve(text)
        except ValueError as error:
            self._report(str(error), node, path)
            return 0

    def _limit(self, message: str, node: yaml.Node, path: Steps) -> ProtocolError:
        line, column = _position(node.start_mark)
        diagnostic = Diagnostic(message, format_path(path), self.file, line, column)
        return ProtocolError(f"{self.file} cannot be read", diagnostics=[diagnostic])

    def _report(self, message: str, node: yaml.Node, path: Steps, hint: str = "") -> None:
        line, column = position = _position(node.start_mark)
        diagnostic = Diagnostic(message, format_path(path), self.file, line, column, hint)
        self.found.setdefault((position, message), diagnostic)
