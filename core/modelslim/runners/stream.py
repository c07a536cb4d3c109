# SPDX-License-Identifier: Apache-2.0
"""The calibration samples of a rank on their way through the model, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from modelslim.activations import Boundary
from modelslim.errors import CapabilityError
from modelslim.merge_order import MergeOrder
from modelslim.ports import PortCollector
from modelslim.ranks import Ranks
from modelslim.types import ProcessRequest

Call = tuple[ProcessRequest, Any]
"""A call of a unit, and what the unit gave for it."""


class Stream:
    """Samples at a boundary. All ranks call its methods together, each with samples of its own.

    Args:
        boundary: the samples of this rank.
        numbers: the number of each in the calibration set.
        order: who sees which samples.
        ranks: who shares the samples.
        outside: measures what lies outside the units; None where that is not wanted.
    """

    def __init__(
        self,
        boundary: Boundary,
        numbers: Sequence[int],
        order: MergeOrder,
        ranks: Ranks,
        outside: PortCollector | None = None,
    ) -> None:
        self._boundary = boundary
        self._numbers = numbers
        place = {number: index for index, number in enumerate(numbers)}
        self._rounds = [[[place[one] for one in group] for group in groups] for groups in order.ranks[ranks.rank]]
        self._ends = order.ends
        self._ranks = ranks
        self._outside = outside

    def start(self) -> None:
        """Let every sample run to its first unit."""
        for number, groups in enumerate(self._rounds):
            for group in groups:
                for index in group:
                    self._boundary.start([index])
                    self._next_sample()
                _end_group(self._outside)
            self._end_round(self._outside, number)

    def run(self, unit: str, ports: PortCollector | None = None, resume: bool = True) -> int:
        """Let the samples pass a unit; see ``Boundary.run_unit``.

        Args:
            unit: its name.
            ports: measures in the unit; None when nothing is measured.
            resume: False to leave the samples at this unit.

        Returns:
            How many tokens passed, of all ranks.
        """

        def passed() -> None:
            if ports is not None:
                ports.next_sample()
            self._next_sample()

        tokens = 0
        shown = [ports, self._outside] if resume else [ports]
        for number, groups in enumerate(self._rounds):
            for group in groups:
                tokens += self._boundary.run_unit(unit, passed, resume, group)
                for one in shown:
                    _end_group(one)
            for one in shown:
                self._end_round(one, number)
        return self._sum(tokens)

    def measure(self, unit: str, ports: PortCollector | None = None, hold: bool = False) -> int:
        """Compute a unit on the samples and leave them there; see ``Boundary.measure_unit``.

        Returns:
            How many tokens passed, of all ranks.
        """

        def passed() -> None:
            if ports is not None:
                ports.next_sample()

        tokens = 0
        for number, groups in enumerate(self._rounds):
            for group in groups:
                tokens += self._boundary.measure_unit(unit, passed, hold, group)
                _end_group(ports)
            self._end_round(ports, number)
        return self._sum(tokens)

    def awake(self) -> AbstractContextManager[None]:
        """All samples of this rank at once; see ``Boundary.awake``."""
        return self._boundary.awake()

    def waiting(self, unit: str) -> Mapping[int, ProcessRequest]:
        """The calls of the unit on the samples of this rank that wait there, by their numbers in the set."""
        return {self._numbers[index]: request for index, request in self._boundary.waiting(unit).items()}

    def held(self) -> Mapping[int, Any]:
        """The outputs that are held on this rank, by the numbers of the samples. Not to be changed."""
        return {self._numbers[index]: output for index, output in self._boundary.held.items()}

    def _next_sample(self) -> None:
        if self._outside is not None:
            self._outside.next_sample()

    def _end_round(self, ports: PortCollector | None, number: int) -> None:
        """What the groups of a round showed is complete."""
        if ports is None:
            return
        if self._ranks.size == 1:
            ports.end_block()
            return
        ports.hold()
        is_last = number + 1 == len(self._rounds)
        if (number + 1) % ports.rounds_at_once == 0 or is_last:
            ports.exchange(self._ranks, self._ends, is_last)

    def _sum(self, tokens: int) -> int:
        return sum(self._ranks.gather(tokens))


def _end_group(ports: PortCollector | None) -> None:
    if ports is not None:
        ports.end_group()


def gathered_calls(unit: ProcessRequest, calls: Mapping[int, Call], ranks: Ranks) -> list[Call]:
    """The calls of all ranks, in the order of the samples.

    Args:
        unit: the unit that is called.
        calls: those of this rank, by number of the sample.
        ranks: who shares the samples.

    Raises:
        CapabilityError: a call holds what cannot be sent to another rank.
    """
    own = {number: [call.args, call.kwargs, output] for number, (call, output) in calls.items()}
    try:
        everywhere = ranks.gather(own)
    except TypeError as error:
        raise CapabilityError(
            f"{unit.name}: its calls hold a {error}, which cannot be sent to another rank",
            hint="run on one device, or use an algorithm that does not replay units, such as linear_quant with gptq",
        ) from error
    found = {number: call for part in everywhere for number, call in part.items()}
    return [
        (replace(unit, args=args, kwargs=kwargs), output)
        for args, kwargs, output in (found[number] for number in sorted(found))
    ]
