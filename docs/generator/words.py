# SPDX-License-Identifier: Apache-2.0
"""Markdown that all reference pages share: headings, tables, and names as code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NOTE = "<!-- Written by docs/generate.py; change what it reads, and run it again. -->\n"

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")


def heading(level: int, text: str) -> str:
    """A heading, the first one of a page with the note that the page is generated."""
    line = f"{'#' * level} {text}\n"
    return f"{NOTE}\n{line}" if level == 1 else line


def code(text: object) -> str:
    """The text as code."""
    return f"`{text}`"


def row(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def rows(head: Sequence[str], lines: Iterable[str]) -> list[str]:
    """A table with that head."""
    return [row(*head), f"|{'---|' * len(head)}", *lines]


def prose(text: str) -> str:
    """Text of a docstring as Markdown."""
    return literal(_ROLE.sub(r"`\1`", text).replace("``", "`"))


def literal(text: str) -> str:
    """The text with its code, and with nothing else that Markdown would take for a sign or a tag."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"(?<!\\)[*<]", r"\\\g<0>", part) for part in parts)


def _cell(text: str) -> str:
    return literal(" ".join(text.split()).replace("|", "\\|"))  # a bar ends a cell even inside of code
