# SPDX-License-Identifier: Apache-2.0
"""The calibration activations at the current unit boundary: one suspended forward per sample."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from modelslim.errors import ModelError
from modelslim.session import Session
from modelslim.types import ProcessRequest


class Boundary:
    """All samples, waiting at the same unit with the arguments of its call.

    Only the arguments of the current unit are alive: a forward that is resumed drops them.

    Args:
        session: the run's hooks.
        model: the model, parts outside the units filled.
        inputs: one model input per sample.
    """

    def __init__(self, session: Session, model: nn.Module, inputs: Sequence[Any]) -> None:
        self._forwards: list[Generator[ProcessRequest, Any, Any]] = [
            session.generate_model_forward(model, sample) for sample in inputs
        ]
        self._requests: list[ProcessRequest | None] = [next(forward) for forward in self._forwards]

    def run_unit(self, unit: str, after_sample: Callable[[], None], resume: bool = True) -> int:
        """Compute the unit on every sample and let each forward run on to its next unit, or to its end.

        Args:
            unit: name of the unit at which the samples wait.
            after_sample: called when a sample has passed the unit and the code behind it.
            resume: False to stay at this unit, when nothing behind it is wanted.

        Returns:
            How many tokens passed.

        Raises:
            ModelError: the forward visits units in another order than the visit.
        """
        tokens = 0
        for index, request in enumerate(self._requests):
            if request is None or request.name != unit:
                there = "its end" if request is None else request.name
                raise ModelError(
                    f"the forward arrives at {there} where the visit says {unit}",
                    hint="generate_model_forward and generate_model_visit of the adapter must yield the same units "
                    "in the same order",
                )
            # .forward, not the call: hooks on the unit have run already, in the suspended forward.
            output = request.module.forward(*request.args, **request.kwargs)
            tokens += _tokens(request)
            self._requests[index] = request = None
            if resume:
                with suppress(StopIteration):
                    self._requests[index] = self._forwards[index].send(output)
            del output
            after_sample()
        return tokens

    def finish_sample(self, index: int, unit: str) -> Any:
        """Compute the last unit on one sample and let its forward run to the end.

        Returns:
            What the forward returned.

        Raises:
            ModelError: another unit follows.
        """
        request = self._requests[index]
        assert request is not None and request.name == unit
        self._requests[index] = None
        try:
            following = self._forwards[index].send(request.module.forward(*request.args, **request.kwargs))
        except StopIteration as end:
            return end.value
        raise ModelError(f"the forward arrives at {following.name} behind the last unit {unit} of the visit")

    def close(self) -> None:
        """End all forwards; nothing behind the current unit is computed."""
        for forward in self._forwards:
            forward.close()
        self._requests.clear()


def _tokens(request: ProcessRequest) -> int:
    tensor = next((value for value in (*request.args, *request.kwargs.values()) if isinstance(value, Tensor)), None)
    return 0 if tensor is None else tensor[..., 0].numel()
