# SPDX-License-Identifier: Apache-2.0
"""What each option of each group costs in quality, with this group alone quantized: measured in one walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from modelslim.analysis.layers import compare_held
from modelslim.analysis.model import FloatModel
from modelslim.analysis.simulate import Simulation, collector_of, statistics_of
from modelslim.analysis.variants import follow_variants
from modelslim.runners.standing import in_place
from modelslim.tune.groups import Group
from modelslim.unit_statistics import UnitStatistics

Key = tuple[int, int]
"""Index of a group and of an option."""


class Sensitivities:
    """Measures them.

    Args:
        model: the float model, best in float32: rounding of a shorter type hides small losses.
        groups: the groups.
        options: what each option makes of the linears; None for the option to stay float.
    """

    def __init__(self, model: FloatModel, groups: Sequence[Group], options: Sequence[Simulation | None]) -> None:
        self._model = model
        self._groups = groups
        self._options = options

    def measure(self, samples: Sequence[Any], method: str) -> dict[Key, float]:
        """The loss of every group with every option, by both indices; 0 for an option that is float.

        Args:
            samples: calibration samples.
            method: ``kl``: mean KL divergence of the model's output, in nats per token. ``output_error``: squared
                error of the output of the group's unit over the square of that output.
        """
        losses: dict[Key, float] = {}
        if method == "kl":
            effects = follow_variants(self._model, samples, self._variants, self._simulations)
            for key, effect in effects.items():
                assert isinstance(key, tuple)
                losses[key] = max(0.0, effect.kl)  # a sum of rounded terms may end below zero
        else:
            losses = self._output_errors(samples)
        for index in range(len(self._groups)):
            for number, option in enumerate(self._options):
                if option is None:
                    losses[index, number] = 0.0
        return losses

    @property
    def _simulations(self) -> list[Simulation]:
        return [option for option in self._options if option is not None]

    def _variants(self, unit: str, statistics: UnitStatistics) -> Mapping[Key, Mapping[str, Any]]:
        return {
            (index, number): option.quantize(unit, self._model.model, statistics, group.names)
            for index, group in enumerate(self._groups)
            if group.unit == unit
            for number, option in enumerate(self._options)
            if option is not None
        }

    def _output_errors(self, samples: Sequence[Any]) -> dict[Key, float]:
        losses: dict[Key, float] = {}
        model = self._model
        with torch.no_grad():
            last = model.info.units[-1]
            with closing(model.start(model.inputs(samples))) as boundary:
                for unit in model.each_unit():
                    with collector_of(self._simulations, unit, model.model) as ports:
                        tokens = boundary.measure_unit(unit, ports.next_sample, hold=True)
                    for key, modules in self._variants(unit, statistics_of(ports, tokens)).items():
                        with in_place(model.model, modules):
                            losses[key] = compare_held(boundary, unit).relative or 0.0
                    boundary.run_unit(unit, lambda: None, resume=unit != last)
                    model.release_filled()
        return losses
