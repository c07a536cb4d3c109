# SPDX-License-Identifier: Apache-2.0
"""One sample on its way through the model: a forward that waits at a unit until somebody answers for it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from modelslim.types import ProcessRequest


@dataclass
class SuspendedForward:
    """A forward as ``generate_model_forward`` gives it, started.

    Attributes:
        generator: the forward.
        request: the call of a unit at which it waits; None when it has ended.
        result: what it returned.
        held: outputs of the unit that were computed already.
    """

    generator: Generator[ProcessRequest, Any, Any]
    request: ProcessRequest | None = None
    result: Any = None
    held: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, generator: Generator[ProcessRequest, Any, Any]) -> SuspendedForward:
        """Let it run to its first unit."""
        return cls(generator, next(generator))

    def waits(self, unit: str) -> bool:
        """True when it waits at this unit."""
        return self.request is not None and self.request.name == unit

    def send(self, output: Any) -> None:
        """Let it go on with the output of the unit."""
        try:
            self.request = self.generator.send(output)
        except StopIteration as end:
            self.request, self.result = None, end.value

    def run(self, unit: str) -> None:
        """Compute the unit as often as it is called in a row."""
        while self.request is not None and self.request.name == unit:
            self.send(self.held.pop() if self.held else compute(self.request))

    def close(self) -> None:
        """End it; nothing more is computed."""
        self.generator.close()


def compute(request: ProcessRequest) -> Any:
    """The output of a unit's call, by the forward of the unit itself: hooks on it have run in the model's forward."""
    return request.module.forward(*request.args, **request.kwargs)
