# SPDX-License-Identifier: Apache-2.0
"""YAML text to PyYAML's node graph, within limits, with syntax errors in plain words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from modelslim.errors import Diagnostic, ProtocolError, nearest

MAX_NODES = 100_000
"""Values in one document, counted after aliases are expanded."""
MAX_DEPTH = 40
"""Mappings and lists inside each other, aliases expanded; keeps PyYAML and jsonschema far from Python's own limit."""
TOO_DEEP = f"mappings and lists lie more than {MAX_DEPTH} levels inside each other"

_MAX_REPAIRS = 20
_MAX_REPAIRED_CHARACTERS = 1 << 16  # parsing again and again is meant for files that people write

_PAIR = r"""(?P<key>[A-Za-z_][\w-]*)[ ]*=[ ]*(?P<value>"[^"]*"|'[^']*'|[^\s#"'=:]\S*)"""
_EQUALS = re.compile(_PAIR)
_EQUALS_LINE = re.compile(rf"(?P<indent>[ ]*(?:-[ ]+)*){_PAIR}[ ]*(?:\#.*)?")


@dataclass(frozen=True)
class Composed:
    """The node graph of one document.

    Attributes:
        root: its top node.
        anchored: ``id`` of each node that carries an anchor.
    """

    root: yaml.Node
    anchored: frozenset[int]


def equals_hint(text: str) -> str:
    """What to write instead when ``text`` begins with ``key=value``; empty when it does not."""
    match = _EQUALS.match(text)
    return f"written {match['key']}={match['value']}, YAML wants {match['key']}: {match['value']}" if match else ""


def compose(text: str, file: str) -> Composed:
    """Read the one document in ``text``.

    Args:
        text: the YAML text.
        file: its name for diagnostics.

    Raises:
        ProtocolError: not YAML, more than one document, a tag, or beyond the limits.
    """
    found: list[Diagnostic] = []
    result = _attempt(text, file)
    # `key=value` breaks the lines around it, so the rest of the file is judged with it put right.
    while isinstance(result, Diagnostic) and len(found) < _MAX_REPAIRS and len(text) <= _MAX_REPAIRED_CHARACTERS:
        repair = _repair_equals(text, result)
        if repair is None:
            break
        retried = _attempt(repair[0], file)
        if isinstance(retried, Diagnostic) and (retried.line, retried.message) == (result.line, result.message):
            break
        text, result = repair[0], retried
        found.append(repair[1])
    if isinstance(result, Diagnostic):
        found.append(result)
    if found or isinstance(result, Diagnostic):
        found.sort(key=lambda diagnostic: (diagnostic.line or 0, diagnostic.column or 0))
        raise ProtocolError(f"{file} cannot be read as YAML", diagnostics=found)
    return result


class _Refused(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, message: str, index: int, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.index, self.hint = message, index, hint


class _Loader(yaml.BaseLoader):
    """PyYAML's composer with limits; constructs nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = 0
        self.depth = 0
        self.anchored: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start = event.start_mark.index
        self.count += 1
        if self.count > MAX_NODES:
            raise _Refused(f"the document holds more than {MAX_NODES:,} values", start)
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if name not in self.anchors:
                hint = nearest(name, self.anchors)
                if not hint.startswith("did you mean"):
                    hint = f'a pattern that starts with * must be in quotes: "*{name}"'
                raise _Refused(f"no anchor &{name} is defined above", start, hint)
            return super().compose_node(parent, index)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(f"the tag {tag} is not allowed", start, "remove it, or put the value into quotes")
        if self.depth == MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise _Refused(TOO_DEEP, start)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor is not None:
            self.anchored.add(id(node))
        return node


def _attempt(text: str, file: str) -> Composed | Diagnostic:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except _Refused as error:
        message, index, hint = error.message, error.index, error.hint
    except yaml.reader.ReaderError as error:
        message, index = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML", error.position
        hint = "delete it"
    except yaml.MarkedYAMLError as error:
        message, index, hint = _explain(text, error)
    except (ValueError, OverflowError):
        # The only numbers that PyYAML converts here: \U escapes and the version of a %YAML directive.
        assert loader is not None
        message, index = "an escape or a version number is out of range", loader.get_mark().index
        hint = r"an escape such as \U0001F600 names a character up to \U0010FFFF"
    else:
        if root is not None and (not isinstance(root, yaml.ScalarNode) or root.value or root.style):
            return Composed(root, frozenset(loader.anchored))
        message, index, hint = "the file is empty", 0, "a protocol starts with apiversion: modelslim_v1"
    line, column = _line_column(text, index)
    return Diagnostic(message, file=file, line=line, column=column, hint=hint)


def _line_column(text: str, index: int) -> tuple[int, int]:
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def _explain(text: str, error: yaml.MarkedYAMLError) -> tuple[str, int, str]:
    """Message, offset in the text and hint for one of PyYAML's errors."""
    problem = error.problem or ""
    context = error.context or ""
    here = error.problem_mark or error.context_mark
    assert here is not None
    start = error.context_mark or here  # where the thing begins that turned out to be wrong
    opened = start.line + 1
    character = text[here.index : here.index + 1]

    if "cannot start any token" in problem and character == "\t":
        line = text[text.rfind("\n", 0, here.index) + 1 : here.index]
        if line.strip():
            return "a tab stands between two words", here.index, "separate with spaces"
        return "the line is indented with a tab", here.index, "indent with spaces"
    if "cannot start any token" in problem:
        return f"a value cannot start with {character}", here.index, "put the value into quotes"
    if context in ("while scanning an alias", "while scanning an anchor", "while scanning a tag"):
        sign = text[start.index]
        word = re.match(r"[^\s,\]}]*", text[start.index :])
        return f"a value that starts with {sign} must be in quotes", start.index, f'write "{word[0] if word else sign}"'
    if context == "while scanning a block scalar":
        return "after | or > the text begins on the next line", here.index, "or put the value into quotes"
    if "could not find expected ':'" in problem:
        return "the line is not of the form key: value", start.index, "a colon is missing, or a quote is not closed"
    if "mapping values are not allowed" in problem:
        hint = "quote a value that holds ': ', start the keys of a mapping in one column, end the key above with ':'"
        return "a ':' is not allowed here", here.index, hint
    if "sequence entries are not allowed" in problem:
        return "a list item cannot start here", here.index, "start each '- ' on a line of its own"
    if match := re.fullmatch(r"expected <block end>, but found '(.*)'", problem):
        inside = f"the items of the list that starts on line {opened}"
        if "mapping" in context:
            inside = f"the keys of the mapping that starts on line {opened}"
        if match[1].endswith("start>"):
            hint = f"{inside} begin in column {start.column + 1}"
            return "the line is indented differently from those that it belongs to", here.index, hint
        if match[1] in ("-", "?"):
            what = "a list item" if match[1] == "-" else "a key"
            return f"{what} cannot stand among {inside}", here.index, "indent it like the lines that it belongs to"
    if "expected <block end>" in problem or "expected '<document start>'" in problem:
        return "the value ends before this", here.index, "put the whole value into quotes"
    if "<stream end>" in problem:
        return "the file ends inside a value", here.index, "a closing bracket is missing"
    if "expected the node content" in problem:
        return "a value is missing here", here.index, ""
    if "unexpected end of stream" in problem or "unexpected document separator" in problem:
        return "the quote that opens here is never closed", start.index, "close it on the same line"
    if match := re.match(r"expected ',' or '(.)'", problem):
        hint = f"add ',' between its parts, or '{match[1]}' at its end"
        bracket = {"]": "[", "}": "{"}[match[1]]
        return f"the '{bracket}' of line {opened} is still open here", here.index, hint
    if "found another document" in problem:
        return "a second document starts here", here.index, "a file holds one protocol; remove the '---'"
    if "duplicate anchor" in context:
        return f"the anchor is defined already on line {opened}", here.index, "give it another name"
    if "unknown escape character" in problem:
        return f"\\{character} is no escape in double quotes", here.index - 1, "use single quotes, or write \\\\"
    return f"not valid YAML: {', '.join(part for part in (context, problem) if part)}", here.index, ""


def _repair_equals(text: str, problem: Diagnostic) -> tuple[str, Diagnostic] | None:
    """The text with the ``key=value`` line at or shortly before the problem written as YAML, and what to say."""
    lines = text.split("\n")
    last = min(problem.line or 1, len(lines)) - 1
    for number in range(last, max(last - 6, -1), -1):
        line = lines[number].rstrip("\r")
        match = _EQUALS_LINE.fullmatch(line)
        if match is None:
            continue
        column = len(match["indent"]) + 1
        hint = equals_hint(line[column - 1 :])
        diagnostic = Diagnostic(hint, file=problem.file, line=number + 1, column=column)
        lines[number] = f"{match['indent']}{match['key']}: {match['value']}"
        return "\n".join(lines), diagnostic
    return None
