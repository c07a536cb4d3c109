# SPDX-License-Identifier: Apache-2.0
"""Selecting linears by name: shell patterns with braces, ``include`` minus ``exclude``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from wcmatch import fnmatch

from modelslim.types import LinearInfo

_FLAGS = fnmatch.BRACE | fnmatch.CASE


def matches(linear: LinearInfo, pattern: str) -> bool:
    """True when the pattern selects the linear, by its name in the model or in the checkpoint.

    A linear outside the units (``lm_head``) must be named outright: the last part of its name has
    to stand in the pattern, so that ``*`` leaves it alone. Experts that are fused into one weight are
    found by the name of that weight as well, when the pattern spells its last part.
    """
    if not linear.unit and linear.name.rpartition(".")[2] not in pattern:
        return False
    if matches_name(linear.name, pattern) or matches_name(linear.stored, pattern):
        return True
    return bool(linear.bank) and linear.bank.rpartition(".")[2] in pattern and matches_name(linear.bank, pattern)


def matches_name(name: str, pattern: str) -> bool:
    """True when the pattern fits the whole name; ``*`` crosses dots."""
    return any(regex.match(name) for regex in _compile(pattern))


@lru_cache(maxsize=256)
def _compile(pattern: str) -> tuple[re.Pattern[str], ...]:
    """One expression for each alternative in braces. A model may have 50,000 expert linears to match."""
    expressions, _ = fnmatch.translate(pattern, flags=_FLAGS)
    return tuple(re.compile(expression) for expression in expressions)


@dataclass(frozen=True)
class Selector:
    """The ``include`` and ``exclude`` of a processor; exclude wins."""

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def select(self, linears: Iterable[LinearInfo]) -> list[LinearInfo]:
        """The linears that are included and not excluded, in their order."""
        return [
            linear
            for linear in linears
            if any(matches(linear, pattern) for pattern in self.include)
            and not any(matches(linear, pattern) for pattern in self.exclude)
        ]

    def takes(self, name: str) -> bool:
        """True when a name, of something else than a linear, is included and not excluded."""
        return any(matches_name(name, pattern) for pattern in self.include) and not any(
            matches_name(name, pattern) for pattern in self.exclude
        )

    def patterns(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Every pattern with its place in the processor's configuration."""
        fields = (("include", self.include), ("exclude", self.exclude))
        return [((field, index), pattern) for field, names in fields for index, pattern in enumerate(names)]
