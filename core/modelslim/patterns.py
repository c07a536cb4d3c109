# SPDX-License-Identifier: Apache-2.0
"""Selecting linears by name: shell patterns with braces, ``include`` minus ``exclude``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wcmatch import fnmatch

from modelslim.types import LinearInfo

_FLAGS = fnmatch.BRACE | fnmatch.CASE


def matches(linear: LinearInfo, pattern: str) -> bool:
    """True when the pattern selects the linear, by its name in the model or in the checkpoint.

    A linear outside the units (``lm_head``) must be named outright: the last part of its name has
    to stand in the pattern, so that ``*`` leaves it alone.
    """
    if not linear.unit and linear.name.rpartition(".")[2] not in pattern:
        return False
    return matches_name(linear.name, pattern) or matches_name(linear.stored, pattern)


def matches_name(name: str, pattern: str) -> bool:
    """True when the pattern fits the whole name; ``*`` crosses dots."""
    return bool(fnmatch.fnmatch(name, pattern, flags=_FLAGS))


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

    def patterns(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Every pattern with its place in the processor's configuration."""
        fields = (("include", self.include), ("exclude", self.exclude))
        return [((field, index), pattern) for field, names in fields for index, pattern in enumerate(names)]
