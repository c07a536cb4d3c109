# SPDX-License-Identifier: Apache-2.0
"""``linear_quant``: integer weights, float, static or dynamic activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modelslim.api import (
    Algorithm,
    ExpertLinear,
    LinearInfo,
    Pattern,
    Problem,
    QuantizedExperts,
    QuantizedLinear,
    QuantSpec,
    Statistic,
    TensorRange,
    Unit,
    UnitStatistics,
)
from modelslim_linear_quant.config import LinearQuantConfig
from modelslim_linear_quant.minmax import WeightRounder, static_scale


class LinearQuant(Algorithm):
    """Quantizes the selected linears to one scheme. Activations are static or computed per token."""

    takes_experts = True

    def __init__(self, config: LinearQuantConfig) -> None:
        self._config = config
        self._rounder = WeightRounder()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LinearQuant:
        """Make it from an entry of ``process``."""
        return cls(LinearQuantConfig.parse(config))

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude``."""
        return self._config.selector.patterns()

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """The selected linears, all with the one spec."""
        return {linear.name: self._config.spec for linear in self._config.selector.select(linears)}

    def check(self, linears: Sequence[LinearInfo]) -> Sequence[Problem]:
        """Refuse group sizes that do not divide the inputs of a selected linear."""
        size = self._config.spec.weight.group_size
        if size is None:
            return ()
        odd: dict[int, list[str]] = {}
        for linear in self._config.selector.select(linears):
            if linear.in_features % size:
                odd.setdefault(linear.in_features, []).append(linear.name)
        return [
            Problem(
                f"group_size {size} does not divide the {inputs} inputs of {names[0]}"
                + (f" and {len(names) - 1} others" if len(names) > 1 else ""),
                hint=f"sizes that do: {', '.join(map(str, _divisors(inputs)))}",
                path=("qconfig", "weight"),
            )
            for inputs, names in odd.items()
        ]

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """The range of the input, where activations are static."""
        return {name: frozenset({TensorRange}) for name, spec in unit.specs.items() if spec.is_static}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Quantize each linear that the plan gave to this entry."""
        return {name: self._quantize(name, unit.linears[name], spec, statistics) for name, spec in unit.specs.items()}

    def _quantize(self, name: str, linear: nn.Module, spec: QuantSpec, statistics: UnitStatistics) -> QuantizedLinear:
        assert isinstance(linear, (nn.Linear, ExpertLinear))
        fused = isinstance(linear, ExpertLinear)
        scale = offset = None
        if spec.is_static and fused:
            ranges = statistics.get_experts(name, TensorRange)
            parts = [static_scale(one, spec.activation, f"{name}, expert {index}") for index, one in enumerate(ranges)]
            scale, offset = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        elif spec.is_static:
            scale, offset = static_scale(statistics.get(name, TensorRange), spec.activation, name)
        weight = self._rounder.quantize(linear.weight, spec.weight)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return (QuantizedExperts if fused else QuantizedLinear)(weight, spec, bias, scale, offset)


def _divisors(number: int) -> list[int]:
    """The group sizes worth offering: powers of two from 32, which hardware likes, else all from 16 on."""
    powers = [size for size in (32, 64, 128, 256, 512) if number % size == 0]
    return powers or [size for size in range(min(16, number), number + 1) if number % size == 0]
