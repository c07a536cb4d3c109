# SPDX-License-Identifier: Apache-2.0
"""The calibration activations at the current unit boundary: one suspended forward per sample."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from torch import Tensor, nn

from modelslim.errors import ModelError
from modelslim.session import Session
from modelslim.spill import Spill
from modelslim.suspended import compute
from modelslim.types import ProcessRequest


class Boundary:
    """Samples, once started all waiting at the same unit with the arguments of its call.

    Only the arguments of the current unit are alive: a forward that is resumed drops them. A sample may
    skip units (a text without an image never enters the vision tower) and then waits at a later one, and
    may enter a unit several times in a row (an image and a video).

    Args:
        session: the run's hooks.
        model: the model, parts outside the units filled.
        inputs: one model input per sample.
        units: names of the units, in the order of the visit.
        around: opened while code of the model outside the units runs.
        spill: takes the memory of samples that wait; None to leave it to them.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        inputs: Sequence[Any],
        units: Sequence[str],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        spill: Spill | None = None,
    ) -> None:
        self._order = {unit: index for index, unit in enumerate(units)}
        self._around = around
        self._spill = spill
        self._forwards: list[Generator[ProcessRequest, Any, Any]] = [
            session.generate_model_forward(model, sample) for sample in inputs
        ]
        self._requests: list[ProcessRequest | None] = [None] * len(self._forwards)
        self._held: dict[int, Any] = {}

    def start(self, among: Sequence[int] | None = None) -> None:
        """Let forwards run to their first unit.

        Args:
            among: numbers of the samples; None for all.

        Raises:
            ModelError: a forward arrives at a unit that the visit does not name.
        """
        with self._around():
            for index in self._numbers(among):
                self._requests[index] = self._arrive(next(self._forwards[index]), "")
                self._sleep(index)

    def run_unit(
        self,
        unit: str,
        after_sample: Callable[[], None],
        resume: bool = True,
        among: Sequence[int] | None = None,
    ) -> int:
        """Compute the unit on every sample that waits there and let its forward run on to its next unit, or to its end.

        Outputs that are held are not computed again.

        Args:
            unit: name of the unit; the units before it have been run.
            after_sample: called when a sample has passed the unit and the code behind it.
            resume: False to stay at this unit, when nothing behind it is wanted.
            among: numbers of the samples that count; None for all.

        Returns:
            How many tokens passed.

        Raises:
            ModelError: the forward visits units in another order than the visit.
        """
        tokens = 0
        for index in self._numbers(among):
            request = self._requests[index]
            if request is None or request.name != unit:
                continue
            self._wake(index)
            while request is not None and request.name == unit:
                output = self._held.pop(index) if index in self._held else compute(request)
                tokens += _tokens(request)
                self._requests[index] = request = None
                if resume:
                    with suppress(StopIteration), self._around():
                        self._requests[index] = request = self._arrive(self._forwards[index].send(output), unit)
                del output
                after_sample()
            self._sleep(index)
        return tokens

    def waiting(self, unit: str) -> dict[int, ProcessRequest]:
        """The calls of the unit on the samples that wait there, by the number of the sample."""
        return {
            index: request
            for index, request in enumerate(self._requests)
            if request is not None and request.name == unit
        }

    @property
    def held(self) -> Mapping[int, Any]:
        """The outputs that are held, by the number of the sample. Not to be changed: forwards go on with them."""
        return self._held

    def measure_unit(
        self,
        unit: str,
        after_sample: Callable[[], None] = lambda: None,
        hold: bool = False,
        among: Sequence[int] | None = None,
    ) -> int:
        """Compute the unit on every sample that waits there, and leave them there.

        A sample that would enter the unit again, with a video behind an image, shows its first entrance only.

        Args:
            unit: name of the unit; the units before it have been run.
            after_sample: called when a sample has passed the unit.
            hold: True to keep the outputs: ``run_unit`` goes on with them, whatever the unit has become by then.
            among: numbers of the samples that count; None for all.

        Returns:
            How many tokens passed.
        """
        waiting = self.waiting(unit)
        if among is not None:
            waiting = {index: waiting[index] for index in among if index in waiting}
        tokens = 0
        for index, request in waiting.items():
            self._wake(index)
            output = compute(request)
            tokens += _tokens(request)
            if hold:
                self._held[index] = output
            del output
            after_sample()
            self._sleep(index)
        return tokens

    def finish_sample(self, index: int, unit: str) -> Any:
        """Compute the last unit on one sample and let its forward run to the end.

        Returns:
            What the forward returned.

        Raises:
            ModelError: another unit follows, or the forward ended before.
        """
        request = self._requests[index]
        if request is None or request.name != unit:
            raise ModelError(
                f"the forward ends before {unit}, the last unit of the visit",
                hint="generate_model_visit of the adapter must yield no unit that the forward does not call",
            )
        self._requests[index] = None
        self._wake(index)
        try:
            while True:
                request = self._arrive(self._forwards[index].send(compute(request)), unit)
        except StopIteration as end:
            return end.value

    def _numbers(self, among: Sequence[int] | None) -> Sequence[int]:
        return range(len(self._forwards)) if among is None else among

    @contextmanager
    def awake(self) -> Iterator[None]:
        """All samples at once, for whoever takes their calls and held outputs out of here."""
        for index in range(len(self._requests)):
            self._wake(index)
        yield
        for index in range(len(self._requests)):
            self._sleep(index)

    def _sleep(self, index: int) -> None:
        if self._spill is not None:
            request = self._requests[index]
            calls = () if request is None else (request.args, request.kwargs)
            self._spill.sleep((self, index), (calls, self._held.get(index)))

    def _wake(self, index: int) -> None:
        if self._spill is not None:
            self._spill.wake((self, index))

    def _arrive(self, request: ProcessRequest, behind: str) -> ProcessRequest:
        """Check that a forward that has passed one unit did not arrive at one that lies before it."""
        hint = (
            "generate_model_forward and generate_model_visit of the adapter must yield the same units in the same order"
        )
        if request.name not in self._order:
            raise ModelError(f"the forward arrives at {request.name}, which the visit does not name", hint=hint)
        if self._order[request.name] < self._order.get(behind, 0):
            raise ModelError(
                f"the forward arrives at {request.name} behind {behind}, and the visit says the reverse", hint=hint
            )
        return request

    def close(self) -> None:
        """End all forwards; nothing behind the current unit is computed."""
        for forward in self._forwards:
            forward.close()
        self._requests.clear()
        self._held.clear()


def _tokens(request: ProcessRequest) -> int:
    tensor = next((value for value in (*request.args, *request.kwargs.values()) if isinstance(value, Tensor)), None)
    return 0 if tensor is None else tensor[..., 0].numel()
