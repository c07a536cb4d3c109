# SPDX-License-Identifier: Apache-2.0
"""What a strategy is: it proposes protocols, is told what became of them, and proposes better ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelslim.analysis.model import DEFAULT_TEXT, FloatModel, find_samples
from modelslim.protocol.document import Document
from modelslim.registry import Registry
from modelslim.tune.plan import TunePlan


@dataclass(frozen=True)
class Candidate:
    """A protocol to try.

    Attributes:
        protocol: as YAML values.
        note: what is special about it, for people.
    """

    protocol: Mapping[str, Any]
    note: str


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate.

    Attributes:
        score: its score.
        passed: True when it reaches the target; True where there is none.
    """

    score: float
    passed: bool


Proposals = Generator[Candidate, Verdict, None]


@dataclass(frozen=True)
class Context:
    """What a strategy may use.

    Attributes:
        plan: the plan.
        model_path: the float model.
        registry: the installed plugins.
        directory: where the tune keeps its trials; for what a strategy measures, so that it is measured once.
        options: further arguments of ``FloatModel``.
        say: tells people something.
    """

    plan: TunePlan
    model_path: Path
    registry: Registry
    directory: Path
    options: Mapping[str, Any]
    say: Callable[[str], None]

    def samples(self, spec: Mapping[str, Any], dataset: str | None = None) -> list[Any]:
        """Calibration samples.

        Args:
            spec: of a protocol, whose set is taken.
            dataset: another one.
        """
        name = dataset or spec.get("dataset", "mix_calib.jsonl")
        text = spec.get("default_text", DEFAULT_TEXT)
        return find_samples(name, self.registry, self.plan.base, text)[1]

    def open(self, dtype: str | None = None) -> FloatModel:
        """The float model."""
        return FloatModel(self.model_path, self.registry, dtype=dtype, **self.options)


class Strategy(ABC):
    """Proposes protocols.

    Args:
        context: what it may use.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.plan.strategy

    @abstractmethod
    def probes(self) -> Sequence[Document]:
        """Protocols that are planned before anything is measured, so that mistakes are told early."""

    @abstractmethod
    def propose(self) -> Proposals:
        """Candidates; each ``yield`` is answered with what became of it."""


def added(protocol: Mapping[str, Any], path: Sequence[str | int], patterns: Sequence[str]) -> dict[str, Any]:
    """A copy of a protocol with patterns added to a list in it, which is made when missing.

    Raises:
        KeyError, IndexError, TypeError: the protocol has no such place.
    """
    result: Any = copy.deepcopy(dict(protocol))
    place = result
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = [*place.get(path[-1], []), *patterns]
    made: dict[str, Any] = result
    return made
