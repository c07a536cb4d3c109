# SPDX-License-Identifier: Apache-2.0
"""The descent: what the unit's output should be, and steps against the sign of the gradient of its error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelslim.api import ALONE, ProcessRequest, Ranks, not_finite
from modelslim_autoround.config import Training
from modelslim_autoround.weight import State, TrainedWeight

_JUDGED = 4  # calls on which iterates are compared, about
_RANGE_EVERY = 4  # steps from one of the ranges to the next, which cost ten times what offsets cost


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors of what a unit returns, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def run(call: ProcessRequest) -> list[Tensor]:
    """The unit's output on a call."""
    return tensors(call.module.forward(*call.args, **call.kwargs))


class Descent:
    """Trains the weights of a unit that stand in it.

    Args:
        unit: its name, for errors.
        weights: what is trained.
        calls: what the unit is called with.
        targets: what it should return for each.
        training: how.
        ranks: who shares the work; all of them descend together.
    """

    def __init__(
        self,
        unit: str,
        weights: Sequence[TrainedWeight],
        calls: Sequence[ProcessRequest],
        targets: Sequence[Any],
        training: Training,
        ranks: Ranks = ALONE,
    ) -> None:
        self._unit = unit
        self._ranks = ranks
        self._weights = weights
        self._calls = calls
        self._targets = [tensors(target) for target in targets]
        self._training = training
        self._least = math.inf
        self._best: list[State] | None = None

    def keep_best(self) -> None:
        """Remember the weights as they are now, if no earlier ones had less error."""
        error = self.error()
        if self._best is None or error < self._least:
            self._least, self._best = error, [weight.state() for weight in self._weights]

    def restore_best(self) -> None:
        """Return to the weights with the least error."""
        for weight, state in zip(self._weights, self._best or (), strict=True):
            weight.restore(state)

    def error(self) -> float:
        """The squared error of the output with the weights as they are now, on some of the calls.

        Raises:
            QuantizationError: it is not finite.
        """
        for weight in self._weights:
            weight.refresh()
        chosen = range(0, len(self._calls), max(1, len(self._calls) // _JUDGED))
        with torch.no_grad():
            own = {index: float(self._error(index)) for index in chosen if self._is_own(index // chosen.step)}
        found = {index: error for part in self._ranks.gather(own) for index, error in part.items()}
        error = math.fsum(found.values())
        if not math.isfinite(error):
            raise not_finite(self._unit, "output")
        return error

    def run(self) -> None:
        """Do all steps."""
        training = self._training
        order = self._order()
        for step in range(training.iters):
            for weight in self._weights:
                weight.refresh()
            with torch.enable_grad():
                self._add_gradients([next(order) for _ in range(min(training.batch_size, len(self._calls)))])
            left = 1 - step / training.iters
            for weight in self._weights:
                weight.step(
                    training.lr * left if training.round_tuning else 0.0,
                    training.minmax_lr * left if training.minmax_tuning and step % _RANGE_EVERY == 0 else 0.0,
                )

    def _add_gradients(self, batch: Sequence[int]) -> None:
        """Those of the errors of these calls, added up in their order."""
        leaves = [weight.value for weight in self._weights]
        own = {
            place: list(torch.autograd.grad(self._error(index), leaves, allow_unused=True))
            for place, index in enumerate(batch)
            if self._is_own(place)
        }
        found = {place: gradients for part in self._ranks.gather(own) for place, gradients in part.items()}
        for place in range(len(batch)):
            for leaf, gradient in zip(leaves, found[place], strict=True):
                if gradient is not None:  # of an expert layer that no token of the call entered
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient

    def _is_own(self, place: int) -> bool:
        """True for this rank's part of several calls."""
        return place % self._ranks.size == self._ranks.rank

    def _order(self) -> Iterator[int]:
        """Numbers of calls, each once before one comes again."""
        generator = torch.Generator().manual_seed(self._training.seed)
        while True:
            yield from torch.randperm(len(self._calls), generator=generator).tolist()

    def _error(self, index: int) -> Tensor:
        outputs = run(self._calls[index])
        parts = [
            (output.to(torch.float32) - target.to(torch.float32)).square().sum()
            for output, target in zip(outputs, self._targets[index], strict=True)
        ]
        return torch.stack(parts).sum()
