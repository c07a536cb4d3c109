# SPDX-License-Identifier: Apache-2.0
"""Who works on which linears of a unit: what reads one input stays together, the rest is divided by its cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from modelslim.quantized import QuantizedLinear
from modelslim.ranks import Ranks
from modelslim.statistics import Gram
from modelslim.unit_statistics import UnitStatistics
from modelslim.wire import linear_from, linear_state

T = TypeVar("T")


class Shares:
    """The division of a unit's linears among ranks, the same at all of them.

    Args:
        linears: the unit's linears by name.
        names: those that are divided.
        statistics: knows which of them read one input.
        ranks: who shares the work.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], names: Iterable[str], statistics: UnitStatistics, ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._owner: dict[str, int] = {}
        if ranks.size == 1:
            self._owner = dict.fromkeys(names, ranks.rank)
            return
        loads = [0] * ranks.size
        compensated = {name for name, _ in statistics.measured(Gram)}
        costs = [
            (sum(_cost(linears[name], name in compensated) for name in group), group)
            for group in statistics.by_input(names)
        ]
        # The costliest first, each to whom has the least to do; ties in the order of the model.
        for cost, group in sorted(costs, key=lambda one: -one[0]):
            rank = loads.index(min(loads))
            loads[rank] += cost
            self._owner.update(dict.fromkeys(group, rank))

    def own(self, values: Mapping[str, T]) -> dict[str, T]:
        """Of values by linear those of this rank's share."""
        return {name: value for name, value in values.items() if self._owner[name] == self._ranks.rank}

    def all(self, modules: Mapping[str, QuantizedLinear], names: Iterable[str]) -> dict[str, QuantizedLinear]:
        """What all ranks have made of their shares.

        Args:
            modules: what this one has made.
            names: of all, in the order that the result is to have.
        """
        if self._ranks.size == 1:
            return dict(modules)
        made = self._ranks.gather({name: linear_state(module) for name, module in modules.items()})
        others = {name: linear_from(state) for part in made for name, state in part.items() if name not in modules}
        found = {**others, **modules}
        return {name: found[name] for name in names if name in found}


def _cost(linear: nn.Module, is_compensated: bool) -> int:
    """Of rounding, in multiplications; with second moments each column makes up for those before it."""
    weight = linear.get_parameter("weight")
    return weight.numel() * (weight.shape[-1] if is_compensated else 1)
