# SPDX-License-Identifier: Apache-2.0
"""Tags name the scenario in which a result runs: an inference engine and a kind of hardware."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modelslim.engines import read_contracts
from modelslim.errors import UsageError, nearest
from modelslim.registry import Registry

HARDWARE = ("Atlas_A2_Inference", "Atlas_A3_Inference", "Atlas_A2_Training", "Atlas_A3_Training", "CPU")
"""Kinds of hardware that published command lines name."""


def folded(tag: str) -> str:
    """A tag as it is compared: in any case, with ``-`` or ``_``."""
    return tag.strip().casefold().replace("_", "-")


def split_tags(words: Iterable[str]) -> tuple[str, ...]:
    """The tags in some words; in one word they may be separated by blanks or commas. Each counts once."""
    tags = (tag for word in words for tag in word.replace(",", " ").split())
    return tuple({folded(tag): tag for tag in tags}.values())


@dataclass(frozen=True)
class Tags:
    """Tags, and what they say.

    Attributes:
        given: as they were written.
        engine: the engine whose contract is checked; empty when no tag names one.
        remarks: what the user should know of them.
    """

    given: tuple[str, ...] = ()
    engine: str = ""
    remarks: tuple[str, ...] = ()

    def missing_in(self, scenario: Iterable[str]) -> list[str]:
        """Those that a scenario lacks."""
        known = {folded(tag) for tag in scenario}
        return [tag for tag in self.given if folded(tag) not in known]


def read_tags(words: Sequence[str], registry: Registry, used: Iterable[str] = ()) -> Tags:
    """What tags mean.

    Args:
        words: as given, see :func:`split_tags`.
        registry: the installed plugins, for the contracts of engines.
        used: tags that practices use.

    Raises:
        UsageError: two of them name engines.
        PluginError: a contract cannot be read.
    """
    given = split_tags(words)
    if not given:
        return Tags()
    contracts = {folded(word): word for one in read_contracts(registry) for word in (one.engine, one.name)}
    engines = [tag for tag in given if folded(tag) in contracts]
    if len(engines) > 1:
        raise UsageError(
            f"--tag names {len(engines)} engines: {', '.join(engines)}",
            hint=f"one scenario has one engine; keep {engines[0]} or another one of them",
        )
    hardware = {folded(tag) for tag in HARDWARE}
    known = {folded(tag): tag for tag in (*contracts.values(), *HARDWARE, *used)}
    remarks = []
    for tag in given:
        if folded(tag) in contracts or folded(tag) in hardware:
            continue
        what = f"the tag {tag} is no hardware that is known, and no engine of which a contract is known: "
        if folded(tag) in known:
            what += "practices name it, and whether an engine of this name loads the result is not checked"
        else:
            meant = nearest(tag, known.values())
            what += "no practice names it, and nothing is checked for it"
            what += f"; {meant}" if meant.startswith("did you mean") else ""
        remarks.append(what)
    return Tags(given, contracts[folded(engines[0])] if engines else "", tuple(remarks))
