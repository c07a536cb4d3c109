# SPDX-License-Identifier: Apache-2.0
"""What the model says at its end when one part of one unit is quantized: many such variants in one walk over the units.

A variant is the float model up to its unit, so it is born there: its forward is fed the float outputs of the units
before, which were kept, and goes on by itself behind it. All living variants pass a unit while it is resident, so
weights are read once; computed are half as many units as there are variants times units.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.analysis.distance import Distance
from modelslim.analysis.model import FloatModel
from modelslim.analysis.simulate import Simulation, collector_of, statistics_of
from modelslim.divergence import kl_sum
from modelslim.open_model import main_tensor
from modelslim.runners.standing import in_place
from modelslim.suspended import SuspendedForward, compute
from modelslim.unit_statistics import UnitStatistics

_ROWS = 64  # tokens whose log-probabilities are in memory at once

Variants = Mapping[Any, Mapping[str, nn.Module]]
"""What takes the places of linears, by name, in each variant of a unit, by its key."""


@dataclass
class Effect:
    """What a variant does to the model's output.

    Attributes:
        distance: of the outputs.
        divergence: sum over tokens of KL(float || variant), in nats, where outputs are logits.
        tokens: how many tokens were compared.
    """

    distance: Distance
    divergence: float = 0.0
    tokens: int = 0

    @property
    def kl(self) -> float:
        """Mean over tokens, in nats."""
        return self.divergence / self.tokens if self.tokens else 0.0


def follow_variants(
    model: FloatModel,
    samples: Sequence[Any],
    variants: Callable[[str, UnitStatistics], Variants],
    measured: Sequence[Simulation],
) -> dict[Hashable, Effect]:
    """Let each variant run to the end of the model and compare it with the float model there.

    Args:
        model: the model.
        samples: calibration samples; the outputs of every unit are kept for each, and one boundary of
            activations for each variant.
        variants: gives the variants of a unit, which is resident, with what was measured of its inputs.
        measured: says what is measured.
    """
    effects: dict[Hashable, Effect] = {}
    alive: dict[Hashable, list[SuspendedForward]] = {}
    with torch.no_grad():
        inputs = model.inputs(samples, together=False)  # the logits of one input are in memory at once
        walk = _Walk(model, inputs)
        try:
            for unit in model.each_unit():
                statistics = walk.measure(unit, measured)
                born = {}
                for key, modules in variants(unit, statistics).items():
                    with in_place(model.model, modules):
                        born[key] = walk.born(unit)
                if unit == model.info.units[-1]:
                    effects = _finish(walk, unit, {**alive, **born})
                    alive.clear()
                    continue
                alive.update(born)
                for forwards in alive.values():
                    for forward in forwards:
                        forward.run(unit)
        finally:
            for forward in [*walk.forwards, *(one for forwards in alive.values() for one in forwards)]:
                forward.close()
    return effects


class _Walk:
    """The float forwards, and all that their units gave; models get copies, since some change what they receive."""

    def __init__(self, model: FloatModel, inputs: Sequence[Any]) -> None:
        self._model = model
        self._inputs = inputs
        self._order = {unit: index for index, unit in enumerate(model.info.units)}
        self._kept: list[list[Any]] = [[] for _ in inputs]
        self.forwards = [self._start(index) for index in range(len(inputs))]

    def _start(self, index: int) -> SuspendedForward:
        return SuspendedForward.start(
            self._model.session.generate_model_forward(self._model.model, self._inputs[index])
        )

    def measure(self, unit: str, simulations: Iterable[Simulation]) -> UnitStatistics:
        """Let the float forwards pass the unit, and keep what it gives; their ends are of no interest."""
        entered = 0
        with collector_of(simulations, unit, self._model.model) as ports:
            for forward, kept in zip(self.forwards, self._kept, strict=True):
                while forward.request is not None and forward.request.name == unit:
                    kept.append(compute(forward.request))
                    ports.next_sample()
                    entered += 1
                    forward.send(deepcopy(kept[-1]))
                forward.result = None
        return statistics_of(ports, entered)

    def born(self, unit: str) -> list[SuspendedForward]:
        """New forwards that wait at the unit with its output computed; the unit is quantized now."""
        forwards = []
        for index in range(len(self._inputs)):
            forward = self.replayed(index, self._order[unit])
            if forward.request is not None and forward.request.name == unit:
                forward.held.append(compute(forward.request))
            forwards.append(forward)
        return forwards

    def replayed(self, index: int, until: int) -> SuspendedForward:
        """A new forward that was fed the float outputs of the units before that of this number."""
        forward, kept = self._start(index), iter(self._kept[index])
        while forward.request is not None and self._order[forward.request.name] < until:
            forward.send(deepcopy(next(kept)))
        return forward


def _finish(walk: _Walk, unit: str, alive: Mapping[Hashable, Sequence[SuspendedForward]]) -> dict[Hashable, Effect]:
    """Compare sample by sample, so that the outputs of one sample are in memory."""
    effects: dict[Hashable, Effect] = {key: Effect(Distance()) for key in alive}
    for index in range(len(walk.forwards)):
        expected = main_tensor(walk.replayed(index, len(walk._order)).result, "the model")
        reference = [rows.float().log_softmax(-1) for rows in _rows(expected)]
        for key, forwards in alive.items():
            forward = forwards[index]
            forward.run(unit)
            output = main_tensor(forward.result, "the model")
            forward.result = None
            effect = effects[key]
            effect.distance.add(output, expected)
            for p, rows in zip(reference, _rows(output), strict=True):
                q = rows.float().log_softmax(-1)
                effect.divergence += kl_sum(p, q)
                effect.tokens += len(p)
    return effects


def _rows(output: Tensor) -> Sequence[Tensor]:
    return torch.split(output.reshape(-1, output.shape[-1]), _ROWS)
