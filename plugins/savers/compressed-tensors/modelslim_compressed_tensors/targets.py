# SPDX-License-Identifier: Apache-2.0
"""Few patterns for many names: how config.json says which linears a scheme is for, and which stay float."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

_ANY = r"\d+"

Tail = tuple[str, ...]
"""The last parts of a name; ``*`` stands for a number."""


def cover(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Patterns that match all the names and none of the others, in sorted order.

    A pattern says what a name ends with, from the part before its first number on (``layers.3.mlp.up_proj``):
    engines hold the layers of one model under different paths, and look up patterns under their own. Where names
    cannot be told apart from others by layer numbers or by more of their path, they are listed as they are.

    Args:
        names: dotted names of linears.
        others: names of linears that must not be matched; the two have none in common.
    """
    alike = {".".join("0" if part.isdigit() else part for part in other.split(".")) for other in others}
    siblings: dict[tuple[Tail, str], set[str]] = defaultdict(set)
    listed: list[str] = []
    pending = [(1, list(names))]
    while pending:
        depth, remaining = pending.pop()
        for tail, members in _by_tail(remaining, depth).items():
            layers = sorted({_first_number(member) for member in members if _first_number(member)}, key=int)
            some = _either(layers)
            if not any(matches(other, _pattern(tail[:-1], tail[-1:], _ANY)) for other in alike):
                siblings[tail[:-1], _ANY].add(tail[-1])
            elif layers and not any(matches(other, _pattern(tail[:-1], tail[-1:], some)) for other in others):
                siblings[tail[:-1], some].add(tail[-1])
            elif depth <= max(member.count(".") for member in members):
                pending.append((depth + 1, members))
            else:
                listed.extend(members)
    return sorted([*listed, *(_pattern(parents, lasts, number) for (parents, number), lasts in siblings.items())])


def matches(name: str, target: str) -> bool:
    """Whether an exact name or a pattern of config.json, one that begins with ``re:``, is for a linear."""
    if not target.startswith("re:"):
        return name == target
    return re.match(target.removeprefix("re:"), name) is not None


def _by_tail(names: Iterable[str], depth: int) -> dict[Tail, list[str]]:
    """Names by their last parts: from ``depth`` parts before the first number on, or before the last part."""
    tails: dict[Tail, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        parts = ["*" if part.isdigit() else part for part in parts]
        tails[tuple(parts[max(first - depth, 0) :])].append(name)
    return tails


def _pattern(parents: Tail, lasts: Iterable[str], number: str) -> str:
    """The pattern of names that end with some parts and then one of others; ``number`` is for the first number."""
    parts = []
    for part in parents:
        parts.append(number if part == "*" else re.escape(part))
        number = _ANY if part == "*" else number
    parts.append(_either(sorted(number if last == "*" else re.escape(last) for last in lasts)))
    return r"re:(?:.*\.)?" + r"\.".join(parts) + "$"


def _either(patterns: Sequence[str]) -> str:
    return "".join(patterns) if len(patterns) < 2 else f"(?:{'|'.join(patterns)})"


def _first_number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")
