# SPDX-License-Identifier: Apache-2.0
"""What all smoothing has in common: which subgraphs, what is measured, in which order they are folded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from modelslim.api import (
    ALONE,
    Algorithm,
    CapabilityError,
    LinearInfo,
    Pattern,
    Problem,
    QuantSpec,
    Ranks,
    Statistic,
    Unit,
    UnitStatistics,
    check_group_sizes,
)
from modelslim_smoothing.config import Choice, Rounding
from modelslim_smoothing.fold import can_shift
from modelslim_smoothing.site import Site


class Smoothing(Algorithm):
    """Moves magnitude from activations into weights; the model's function stays.

    Attributes:
        kinds: what is measured of a tensor.
        rounding: what a search rounds with; None for a formula without a search.
    """

    requires = frozenset({"get_adapter_config_for_subgraph"})
    rescales = True

    kinds: ClassVar[frozenset[type[Statistic]]]
    rounding: Rounding | None = None

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._included: frozenset[str] | None = None
        self._excluded: frozenset[str] = frozenset()

    @abstractmethod
    def scale(self, site: Site, statistics: UnitStatistics, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
        """The scale of a subgraph as ``Site.limit`` answers it, and the shift or None; ranks share a search."""

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude``."""
        return self._choice.patterns()

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """It quantizes nothing; what it may fold into is noted."""
        self._included, self._excluded = self._choice.linears(linears)
        return {}

    def check(self, linears: Sequence[LinearInfo]) -> Sequence[Problem]:
        """Refuse groups that do not divide the inputs of a linear."""
        if self.rounding is None:
            return []
        included, excluded = self._choice.linears(linears)
        chosen = [one for one in linears if one.module in included - excluded]
        weight = self.rounding.spec.weight
        return check_group_sizes([(one, weight) for one in chosen], self.rounding.path)

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """The inputs of the targets, once per subgraph."""
        return {name: self.kinds for site in self._sites(unit) for name in site.ports}

    def edits(self, unit: Unit) -> frozenset[str]:
        """Weights and biases of sources and targets.

        Raises:
            CapabilityError: a shift needs a bias where there cannot be one.
        """
        names: frozenset[str] = frozenset()
        for site in self._sites(unit):
            shifts = self.shifts and site.is_norm
            stiff = [name for name, module in site.targets.items() if not can_shift(module)]
            if shifts and stiff:
                raise CapabilityError(
                    f"symmetric: false adds a bias to all that reads {site.subgraph.source}, and {stiff[0]} has none "
                    "in any engine: it is a router or holds experts",
                    hint="exclude the linears behind this norm here, and smooth them by an entry with symmetric: true",
                )
            names |= site.parameters(shifts=shifts)
        return names

    def multiplies_inputs(self, unit: Unit) -> frozenset[str]:
        """Linears behind what cannot be divided."""
        return frozenset(name for site in self._sites(unit) if site.source is None for name in site.targets)

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Fold a scale into every subgraph."""
        for site in self._sites(unit):
            site.fold(*self.scale(site, statistics, unit.ranks), statistics)
        return {}

    def _sites(self, unit: Unit) -> list[Site]:
        sites = [Site.find(unit, subgraph) for subgraph in self._choice.sorted(unit.subgraphs)]
        return [site for site in sites if self._chosen(site)]

    def _chosen(self, site: Site) -> bool:
        """Some target is included and none excluded, since all of them share the scale."""
        if not site.judged:
            return False
        included = self._included is None or not self._included.isdisjoint(site.judged)
        return included and self._excluded.isdisjoint(site.judged)
