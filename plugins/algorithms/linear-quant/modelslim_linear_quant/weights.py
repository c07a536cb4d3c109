# SPDX-License-Identifier: Apache-2.0
"""Rounds the weights of a unit; what linears of one port have in common is computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear, Gram, QuantizedTensor, Unit, UnitStatistics
from modelslim_linear_quant import gptq, mse, ssz
from modelslim_linear_quant.config import WeightMethod
from modelslim_linear_quant.minmax import WeightRounder
from modelslim_linear_quant.static import no_token, not_finite


class UnitRounder:
    """Rounds weights by the method of the configuration.

    Args:
        method: the method.
    """

    def __init__(self, method: WeightMethod) -> None:
        self._method = method
        self._minmax = WeightRounder()

    def quantize(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, QuantizedTensor]:
        """The weights of all linears that have a spec, by name.

        Raises:
            QuantizationError: the method wants inputs of a linear, and they are missing or not finite.
        """
        if self._method.name == "gptq":
            return self._compensate(unit, statistics)
        return {name: self._round(name, unit, statistics) for name in unit.specs}

    def _round(self, name: str, unit: Unit, statistics: UnitStatistics) -> QuantizedTensor:
        weight, spec = _weight(unit.linears[name]), unit.specs[name].weight
        if self._method.name == "ssz":
            return ssz.quantize(weight, spec, self._method.step)
        if self._method.name == "mse":
            return mse.quantize(weight, spec, self._energy(name, unit, statistics))
        return self._minmax.quantize(weight, spec)

    def _energy(self, name: str, unit: Unit, statistics: UnitStatistics) -> Tensor | None:
        if not self._method.sees_inputs:
            return None
        if isinstance(unit.linears[name], ExpertLinear):
            return torch.stack([gram.diagonal() for gram in _expert_grams(name, statistics)])
        return _gram(statistics.get(name, Gram), name).diagonal()

    def _compensate(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, QuantizedTensor]:
        """gptq: linears of one port share the decomposition of its Hessian, and the pass over its columns."""
        done: dict[str, QuantizedTensor] = {}
        ports: dict[int, list[str]] = {}
        for name, spec in unit.specs.items():
            if isinstance(unit.linears[name], ExpertLinear):
                grams = _expert_grams(name, statistics)
                weight = _weight(unit.linears[name])
                done[name] = gptq.quantize_experts(weight, grams, spec.weight, self._method, name)
            else:
                ports.setdefault(id(_gram(statistics.get(name, Gram), name)), []).append(name)
        for names in ports.values():
            gram = _gram(statistics.get(names[0], Gram), names[0])
            factor = gptq.factorize(gram, self._method, names[0])
            for scheme in dict.fromkeys(unit.specs[name].weight for name in names):
                alike = [name for name in names if unit.specs[name].weight == scheme]
                weights = [_weight(unit.linears[name]).to(torch.float32) for name in alike]
                whole = gptq.quantize(torch.cat(weights), factor, scheme, self._method)
                done.update(zip(alike, _split(whole, list(map(len, weights))), strict=True))
        return {name: done[name] for name in unit.specs}


def _split(whole: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """Linears that were quantized one above the other; each owns its memory."""
    codes, scales = torch.split(whole.codes, rows), torch.split(whole.scale, rows)
    offsets = [None] * len(rows) if whole.offset is None else torch.split(whole.offset, rows)
    return [
        QuantizedTensor(code.clone(), scale.clone(), None if offset is None else offset.clone(), whole.spec)
        for code, scale, offset in zip(codes, scales, offsets, strict=True)
    ]


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, (nn.Linear, ExpertLinear))
    return linear.weight


def _expert_grams(bank: str, statistics: UnitStatistics) -> list[Tensor]:
    grams = statistics.get_experts(bank, Gram)
    return [_gram(gram, f"{bank}, expert {index}") for index, gram in enumerate(grams)]


def _gram(observed: Gram, linear: str) -> Tensor:
    """The Gram matrix of an input, which must have been seen and be finite."""
    if observed.matrix is None:
        raise no_token(linear, "what its errors cost")
    if not observed.matrix.diagonal().isfinite().all():
        raise not_finite(linear)
    return observed.matrix
