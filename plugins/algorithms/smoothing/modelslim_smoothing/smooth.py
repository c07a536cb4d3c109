# SPDX-License-Identifier: Apache-2.0
"""``smooth_quant`` and ``iter_smooth``: scales by a formula (Xiao et al. 2022), and shifts (Wei et al. 2023).

``s = max|x|^alpha / max|W|^(1 - alpha)`` for every channel; with a shift, ``x`` stands for ``x - z`` with
``z = (max x + min x) / 2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from modelslim.api import ALONE, ChannelRange, Ranks, Statistic, UnitStatistics
from modelslim_smoothing.algorithm import Smoothing
from modelslim_smoothing.config import Choice
from modelslim_smoothing.scales import TINY, balance, centre
from modelslim_smoothing.site import Site


class IterSmooth(Smoothing):
    """Folds scales into subgraphs of all types."""

    kinds: ClassVar[frozenset[type[Statistic]]] = frozenset({ChannelRange})

    def __init__(self, choice: Choice, alpha: float, smallest: float, *, symmetric: bool) -> None:
        super().__init__(choice)
        self._alpha = alpha
        self._smallest = smallest
        self.shifts = not symmetric and "norm-linear" in choice.types

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IterSmooth:
        """Make it from an entry of ``process``."""
        return cls(
            Choice.parse(config),
            config.get("alpha", 0.9),
            config.get("scale_min", TINY),
            symmetric=config.get("symmetric", True),
        )

    def scale(self, site: Site, statistics: UnitStatistics, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
        """By the formula."""
        low, high = site.ranges(statistics)
        shift = centre(low, high) if self.shifts and site.is_norm else None
        magnitude = torch.maximum(-low, high) if shift is None else torch.maximum(shift - low, high - shift)
        scale = balance(magnitude, site.weights(), self._alpha, 1 - self._alpha, self._smallest)
        return site.limit(scale), shift


class SmoothQuant(IterSmooth):
    """The same behind norms alone, with the paper's exponent."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SmoothQuant:
        """Make it from an entry of ``process``."""
        return cls(
            Choice.parse(config, ("norm-linear",)),
            config.get("alpha", 0.5),
            TINY,
            symmetric=config.get("symmetric", True),
        )
