# SPDX-License-Identifier: Apache-2.0
"""``awq``: scales that protect the weights which read large activations (Lin et al. 2023).

``s = mean|x|^r``, with the ratio ``r`` for which ``||Q(W s) (x / s) - W x||`` is smallest on calibration tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from modelslim.api import ALONE, ChannelAbsMean, ChannelRange, Ranks, RowSample, Statistic, UnitStatistics
from modelslim_smoothing.algorithm import Smoothing
from modelslim_smoothing.config import Choice, Rounding
from modelslim_smoothing.scales import salient
from modelslim_smoothing.search import exponents, search, trials
from modelslim_smoothing.site import Site


class Awq(Smoothing):
    """For weights of few bits under float inputs."""

    kinds: ClassVar[frozenset[type[Statistic]]] = frozenset({ChannelAbsMean, ChannelRange, RowSample})

    def __init__(self, choice: Choice, steps: int, rounding: Rounding) -> None:
        super().__init__(choice)
        self._steps = steps
        self.rounding: Rounding = rounding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Awq:
        """Make it from an entry of ``process``."""
        rounding = Rounding.parse({"weight": config["weight_qconfig"]}, ("weight_qconfig",))
        return cls(Choice.parse(config), config.get("n_grid", 20), rounding)

    def scale(self, site: Site, statistics: UnitStatistics, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
        """By one search."""
        a = site.means(statistics)
        scales = site.limit(salient(a, exponents(self._steps, a, last=False)))
        best, _ = search(trials(site, statistics), scales, self.rounding.spec, self.rounding.steps, ranks)
        return scales[best], None
