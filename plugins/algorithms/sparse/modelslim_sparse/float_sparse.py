# SPDX-License-Identifier: Apache-2.0
"""``float_sparse``: weights that stay float, a share of them zero and most of the others short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import (
    FLOAT,
    Algorithm,
    ExpertLinear,
    Gram,
    LinearInfo,
    Pattern,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    Selector,
    Statistic,
    TensorSpec,
    Unit,
    UnitStatistics,
)
from modelslim_sparse.hessian import Hessian, decompose, expert_grams, gram_of, notes
from modelslim_sparse.pruning import prune
from modelslim_sparse.short_floats import shorten

_SPEC = QuantSpec(TensorSpec("float", "per_channel", sparse=True), FLOAT)
_BATCH = 1 << 27  # values in the Hessians of the experts that are worked on at once


class FloatSparse(Algorithm):
    """Prunes linears so that their outputs stay what they were, as far as the other weights can make up for it.

    Args:
        selector: which linears.
        ratio: share of the weights of each that become zero.
    """

    takes_experts = True
    separable = True
    compensates = True

    def __init__(self, selector: Selector, ratio: float = 0.3) -> None:
        self._selector = selector
        self._ratio = ratio

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FloatSparse:
        """Make it from an entry of ``process``."""
        selector = Selector(tuple(config.get("include", ("*",))), tuple(config.get("exclude", ())))
        return cls(selector, config.get("sparse_ratio", 0.3))

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude``."""
        return self._selector.patterns()

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """The selected linears, all with the one spec."""
        return {linear.name: _SPEC for linear in self._selector.select(linears)}

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """The Gram matrix of each input."""
        return {name: frozenset({Gram}) for name in unit.specs}

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Prune each linear that the plan gave to this entry; those of one input share its decomposition."""
        made: dict[str, nn.Module] = {}
        experts = [name for name in unit.specs if isinstance(unit.linears[name], ExpertLinear)]
        for name in experts:
            made[name] = self._experts(name, unit, expert_grams(name, statistics))
        for names in statistics.by_input(name for name in unit.specs if name not in experts):
            hessian = decompose(gram_of(names[0], statistics))
            weights = [_weight(unit.linears[name]) for name in names]
            rows = list(map(len, weights))
            whole = self._sparse(torch.cat(weights), hessian, weights[0].dtype, rows)
            for name, part in zip(names, torch.split(whole, rows), strict=True):
                made[name] = QuantizedLinear(
                    _as_codes(part.clone(), unit.specs[name]),
                    unit.specs[name],
                    _bias(unit.linears[name]),
                    notes=notes(hessian.damping),
                )
        return {name: made[name] for name in unit.specs}

    def _experts(self, name: str, unit: Unit, grams: Sequence[Tensor]) -> QuantizedExperts:
        """All experts of a layer, as many at once as memory should hold."""
        weight, spec = _weight(unit.linears[name]), unit.specs[name]
        step = max(1, _BATCH // weight.shape[-1] ** 2)
        parts, dampings = [], []
        for start in range(0, len(weight), step):
            hessian = decompose(torch.stack(list(grams[start : start + step])))
            some = weight[start : start + step]
            parts.append(self._sparse(some, hessian, weight.dtype, [some.shape[-2]]))
            dampings.append(hessian.damping)
        codes = _as_codes(torch.cat(parts), spec)
        return QuantizedExperts(codes, spec, _bias(unit.linears[name]), notes=notes(torch.cat(dampings)))

    def _sparse(self, weight: Tensor, hessian: Hessian, dtype: torch.dtype, rows: list[int]) -> Tensor:
        return shorten(prune(weight.to(torch.float32), hessian, self._ratio, rows), hessian, dtype, rows)


def _as_codes(values: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """A weight whose codes are its values."""
    scale = torch.ones(*values.shape[:-1], 1, dtype=torch.float32, device=values.device)
    return QuantizedTensor(values, scale, None, spec.weight)


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, (nn.Linear, ExpertLinear))
    return linear.weight.detach()


def _bias(linear: nn.Module) -> Tensor | None:
    assert isinstance(linear, (nn.Linear, ExpertLinear))
    return None if linear.bias is None else linear.bias.detach().clone()
