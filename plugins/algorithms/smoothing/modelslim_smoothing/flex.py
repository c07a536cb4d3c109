# SPDX-License-Identifier: Apache-2.0
"""``flex_smooth_quant`` and ``flex_awq_ssz``: the exponents of every subgraph are searched by output error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from modelslim.api import ALONE, ChannelAbsMean, ChannelRange, Ranks, RowSample, Statistic, UnitStatistics
from modelslim_smoothing.algorithm import Smoothing
from modelslim_smoothing.config import Choice, Rounding
from modelslim_smoothing.scales import balance
from modelslim_smoothing.search import exponents, search, trials
from modelslim_smoothing.site import Site

_STEPS = 20  # exponents are tried in steps of 0.05


class FlexSmoothQuant(Smoothing):
    """``s = max|x|^alpha / max|W|^beta``, with the exponents that leave the smallest output error.

    First ``alpha`` is searched with ``beta = 1 - alpha``, then ``beta`` with the best ``alpha``; one that
    the entry gives is not searched.
    """

    kinds: ClassVar[frozenset[type[Statistic]]] = frozenset({ChannelRange, RowSample})

    def __init__(self, choice: Choice, alpha: float | None, beta: float | None, rounding: Rounding) -> None:
        super().__init__(choice)
        self._alpha = alpha
        self._beta = beta
        self.rounding: Rounding = rounding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlexSmoothQuant:
        """Make it from an entry of ``process``."""
        rounding = Rounding.parse(config["qconfig"], ("qconfig",)) if "qconfig" in config else Rounding()
        return cls(Choice.parse(config), config.get("alpha"), config.get("beta"), rounding)

    def scale(self, site: Site, statistics: UnitStatistics, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
        """By two searches at most."""
        low, high = site.ranges(statistics)
        a, w = torch.maximum(-low, high), site.weights()
        alpha: Tensor | float | None = self._alpha
        beta: Tensor | float | None = self._beta
        tried = trials(site, statistics) if alpha is None or beta is None else []
        rounding = self.rounding
        values = exponents(_STEPS, a)
        if alpha is None:
            scales = site.limit(balance(a, w, values, 1 - values if beta is None else beta))
            alpha = values[search(tried, scales, rounding.spec, rounding.steps, ranks)[0]]
        if beta is None:
            scales = site.limit(balance(a, w, alpha, values))
            beta = values[search(tried, scales, rounding.spec, rounding.steps, ranks)[0]]
        return site.limit(balance(a, w, alpha, beta)), None


class FlexAwqSsz(Smoothing):
    """``s = mean|x|^alpha / max|W|^beta``, ``beta`` being 0 unless the entry gives it.

    The exponent is the one that leaves the smallest output error under the rounding of the entry.
    """

    kinds: ClassVar[frozenset[type[Statistic]]] = frozenset({ChannelAbsMean, ChannelRange, RowSample})

    def __init__(self, choice: Choice, alpha: float | None, beta: float, rounding: Rounding) -> None:
        super().__init__(choice)
        self._alpha = alpha
        self._beta = beta
        self.rounding: Rounding = rounding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlexAwqSsz:
        """Make it from an entry of ``process``."""
        rounding = Rounding.parse(config["qconfig"], ("qconfig",))
        return cls(Choice.parse(config), config.get("alpha"), config.get("beta") or 0.0, rounding)

    def scale(self, site: Site, statistics: UnitStatistics, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
        """By one search at most."""
        a, w = site.means(statistics), site.weights()
        if self._alpha is not None:
            return site.limit(balance(a, w, self._alpha, self._beta)), None
        scales = site.limit(balance(a, w, exponents(_STEPS, a), self._beta))
        best, _ = search(trials(site, statistics), scales, self.rounding.spec, self.rounding.steps, ranks)
        return scales[best], None
