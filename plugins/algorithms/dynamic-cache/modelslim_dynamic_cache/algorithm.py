# SPDX-License-Identifier: Apache-2.0
"""``dynamic_cache``: static scales for the keys and values that an engine keeps in its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import (
    Algorithm,
    CacheInfo,
    ChannelRange,
    Pattern,
    QuantizationError,
    QuantizedCache,
    Selector,
    Statistic,
    TensorSpec,
    Unit,
    UnitStatistics,
    range_to_scale,
)


class DynamicCache(Algorithm):
    """Quantizes the caches of the selected attentions.

    Args:
        spec: what keys and values become: ``per_channel`` or ``per_tensor``.
        selector: patterns of the names of attentions.
    """

    requires = frozenset({"get_kv_caches"})
    takes_caches = True

    def __init__(self, spec: TensorSpec, selector: Selector) -> None:
        self._spec = spec
        self._selector = selector

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DynamicCache:
        """Make it from an entry of ``process``."""
        qconfig = config.get("qconfig", {})
        spec = TensorSpec(
            qconfig.get("dtype", "int8"), qconfig.get("scope", "per_channel"), qconfig.get("symmetric", True)
        )
        return cls(spec, Selector(tuple(config.get("include", ("*",))), tuple(config.get("exclude", ()))))

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude``."""
        return self._selector.patterns()

    def select_caches(self, caches: Sequence[CacheInfo]) -> Mapping[str, TensorSpec]:
        """Keys and values of the selected attentions."""
        return {one.name: self._spec for one in caches if self._selector.takes(one.attention)}

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """The range of every channel of keys and values."""
        return {name: frozenset({ChannelRange}) for name in unit.caches}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Linears are left alone."""
        return {}

    def quantize_caches(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, QuantizedCache]:
        """Scales from the ranges that calibration saw."""
        return {name: _quantize(name, spec, statistics.get(name, ChannelRange)) for name, spec in unit.caches.items()}


def _quantize(name: str, spec: TensorSpec, seen: ChannelRange) -> QuantizedCache:
    low, high = seen.minimum, seen.maximum
    if low is None or high is None:
        raise QuantizationError(
            f"{name}: no calibration token entered this cache, so its scale is unknown",
            hint="calibrate on more varied data, or exclude its attention",
        )
    if not (torch.isfinite(low) & torch.isfinite(high)).all():
        raise QuantizationError(
            f"{name}: NaN or infinity entered this cache during calibration",
            hint="run the float model on the same data first; in float16 an overflow is likely, bfloat16 has none",
        )
    if spec.scope == "per_tensor":
        low, high = low.amin().view(1), high.amax().view(1)
    scale, offset = range_to_scale(low, high, spec)
    return QuantizedCache(spec, scale, _zeros(scale) if offset is None else offset)


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros_like(scale, dtype=torch.int8)
