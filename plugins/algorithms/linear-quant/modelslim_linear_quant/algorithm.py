# SPDX-License-Identifier: Apache-2.0
"""``linear_quant``: integer or small floating weights, float, static or dynamic activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from modelslim.api import (
    Algorithm,
    ExpertLinear,
    Fallback,
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
    check_group_sizes,
)
from modelslim_linear_quant.config import LinearQuantConfig
from modelslim_linear_quant.histogram import Histogram
from modelslim_linear_quant.static import expert_scales, linear_scale
from modelslim_linear_quant.weights import UnitRounder


class LinearQuant(Algorithm):
    """Quantizes the selected linears to one scheme. Activations are static or computed per token."""

    takes_experts = True
    separable = True

    def __init__(self, config: LinearQuantConfig) -> None:
        self._config = config
        self._rounder = UnitRounder(config.weight)
        self._static: type[TensorRange | Histogram] = Histogram if config.activation == "histogram" else TensorRange
        self.compensates = config.weight.name == "gptq"
        self._other = None if config.to is None else LinearQuant(config.to)
        if config.above is not None:
            self.fallback = Fallback("relative_error", config.above, self._other, config.to.spec if config.to else None)

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
        return [
            *_check_groups(linears, self._config, ("qconfig", "weight")),
            *(_check_groups(linears, self._config.to, ("fallback", "to")) if self._config.to else ()),
        ]

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """What the methods of weights and static activations want to know of the inputs."""
        needs: dict[str, set[type[Statistic]]] = {name: set() for name in unit.specs}
        for name, spec in unit.specs.items():
            needs[name] |= self._rounder.needs
            if spec.is_static:
                needs[name].add(self._static)
        if self._other is not None:
            again = replace(unit, specs=dict.fromkeys(unit.specs, self._other._config.spec))
            for name, kinds in self._other.needs(again).items():
                needs[name] |= kinds
        return {name: frozenset(kinds) for name, kinds in needs.items() if kinds}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Quantize each linear that the plan gave to this entry."""
        modules: dict[str, nn.Module] = {}
        for name, rounded in self._rounder.quantize(unit, statistics).items():
            linear, spec = unit.linears[name], unit.specs[name]
            assert isinstance(linear, (nn.Linear, ExpertLinear))
            bias = None if linear.bias is None else linear.bias.detach().clone()
            fused = isinstance(linear, ExpertLinear)
            scale: Tensor | None = None
            offset: Tensor | None = None
            if spec.is_static and fused:
                scale, offset = expert_scales(statistics.get_experts(name, self._static), spec.activation, name)
            elif spec.is_static:
                scale, offset = linear_scale(statistics.get(name, self._static), spec.activation, name)
            modules[name] = (QuantizedExperts if fused else QuantizedLinear)(
                rounded.weight, spec, bias, scale, offset, notes=rounded.notes
            )
        return modules


def _check_groups(linears: Sequence[LinearInfo], config: LinearQuantConfig, path: tuple[str, ...]) -> Sequence[Problem]:
    return check_group_sizes([(one, config.spec.weight) for one in config.selector.select(linears)], path)
