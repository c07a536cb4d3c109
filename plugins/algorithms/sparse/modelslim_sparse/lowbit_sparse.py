# SPDX-License-Identifier: Apache-2.0
"""``lowbit_sparse``: int8 weights of which all but a few outliers need four bits, and static int8 inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modelslim.api import (
    Algorithm,
    Gram,
    LinearInfo,
    Pattern,
    QuantizedLinear,
    QuantSpec,
    Selector,
    Statistic,
    TensorRange,
    TensorSpec,
    Unit,
    UnitStatistics,
    seen_range,
    static_scale,
)
from modelslim_sparse.hessian import decompose, gram_of, notes
from modelslim_sparse.low_bits import quantize


class LowbitSparse(Algorithm):
    """Quantizes linears to W8A8S.

    Args:
        selector: which linears.
        fraction: share of the codes of each that may be outliers.
        symmetric: whether inputs have no offset.
    """

    separable = True
    compensates = True

    def __init__(self, selector: Selector, fraction: float = 0.01, *, symmetric: bool = False) -> None:
        self._selector = selector
        self._fraction = fraction
        self._spec = QuantSpec(
            TensorSpec("int8", "per_channel", sparse=True), TensorSpec("int8", "per_tensor", symmetric)
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowbitSparse:
        """Make it from an entry of ``process``."""
        selector = Selector(tuple(config.get("include", ("*",))), tuple(config.get("exclude", ())))
        return cls(selector, config.get("fraction", 0.01), symmetric=config.get("symmetric", False))

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude``."""
        return self._selector.patterns()

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """The selected linears, all with the one spec."""
        return {linear.name: self._spec for linear in self._selector.select(linears)}

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """The Gram matrix and the range of each input."""
        return {name: frozenset({Gram, TensorRange}) for name in unit.specs}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Quantize each linear that the plan gave to this entry; those of one input share its decomposition."""
        made: dict[str, nn.Module] = {}
        for names in statistics.by_input(unit.specs):
            hessian = decompose(gram_of(names[0], statistics))
            for name in names:
                linear, spec = unit.linears[name], unit.specs[name]
                assert isinstance(linear, nn.Linear)
                weight = quantize(linear.weight.detach().to(torch.float32), hessian, spec.weight, self._fraction)
                bias = None if linear.bias is None else linear.bias.detach().clone()
                low, high = seen_range(statistics.get(name, TensorRange), name)
                scale, offset = static_scale(low, high, spec.activation)
                made[name] = QuantizedLinear(weight, spec, bias, scale, offset, notes=notes(hessian.damping))
        return {name: made[name] for name in unit.specs}
