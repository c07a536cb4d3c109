# SPDX-License-Identifier: Apache-2.0
"""Rounds the weights of a unit; what linears of one port have in common is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelslim.api import (
    ChannelEnergy,
    ExpertLinear,
    Gram,
    QuantizedTensor,
    Statistic,
    Unit,
    UnitStatistics,
    no_token,
    not_finite,
    seen_gram,
)
from modelslim_linear_quant import floats, gptq, mse, ssz
from modelslim_linear_quant.config import WeightMethod
from modelslim_linear_quant.minmax import WeightRounder
from modelslim_linear_quant.static import UNCALIBRATED


@dataclass(frozen=True)
class Rounded:
    """A weight, and what there is to say about it.

    Attributes:
        weight: the integer weight.
        notes: for the report.
    """

    weight: QuantizedTensor
    notes: tuple[str, ...] = ()


class UnitRounder:
    """Rounds weights by the method of the configuration.

    Args:
        method: the method.
    """

    def __init__(self, method: WeightMethod) -> None:
        self._method = method
        self._minmax = WeightRounder()

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What it wants to know of the inputs of each linear."""
        if not self._method.sees_inputs:
            return frozenset()
        return frozenset({Gram if self._method.name == "gptq" else ChannelEnergy})

    def quantize(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, Rounded]:
        """The weights of all linears that have a spec, by name.

        Raises:
            QuantizationError: the method wants inputs of a linear, and they are missing or not finite.
        """
        if self._method.name == "gptq":
            return self._compensate(unit, statistics)
        return {name: Rounded(self._round(name, unit, statistics)) for name in unit.specs}

    def _round(self, name: str, unit: Unit, statistics: UnitStatistics) -> QuantizedTensor:
        weight, spec = _weight(unit.linears[name]), unit.specs[name].weight
        if not spec.is_integer:
            whole = _largest_of_port(name, unit, statistics) if spec.dtype == "nvfp4" else None
            return floats.quantize(weight, spec, self._method, self._energy(name, unit, statistics), whole)
        if self._method.name == "ssz":
            return ssz.quantize(weight, spec, self._method.step, self._energy(name, unit, statistics))
        if self._method.name == "mse":
            return mse.quantize(weight, spec, self._energy(name, unit, statistics))
        return self._minmax.quantize(weight, spec)

    def _energy(self, name: str, unit: Unit, statistics: UnitStatistics) -> Tensor | None:
        if not self._method.sees_inputs:
            return None
        if isinstance(unit.linears[name], ExpertLinear):
            seen = statistics.get_experts(name, ChannelEnergy)
            return torch.stack([_energy(one, f"{name}, expert {index}") for index, one in enumerate(seen)])
        return _energy(statistics.get(name, ChannelEnergy), name)

    def _compensate(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, Rounded]:
        """gptq: linears of one port share the decomposition of its Hessian, and the pass over its columns."""
        done: dict[str, Rounded] = {}
        dense = []
        for name, spec in unit.specs.items():
            if isinstance(unit.linears[name], ExpertLinear):
                grams = _expert_grams(name, statistics)
                whole, percdamp = gptq.quantize_experts(_weight(unit.linears[name]), grams, spec.weight, self._method)
                done[name] = Rounded(whole, gptq.notes(percdamp, self._method))
            else:
                dense.append(name)
        for names in statistics.by_input(dense):
            gram = seen_gram(statistics.get(names[0], Gram), names[0], UNCALIBRATED)
            factor = gptq.factorize(gram, self._method)
            notes = gptq.notes(factor.percdamp, self._method)
            for scheme in dict.fromkeys(unit.specs[name].weight for name in names):
                alike = [name for name in names if unit.specs[name].weight == scheme]
                weights = [_weight(unit.linears[name]).to(torch.float32) for name in alike]
                whole = gptq.quantize(torch.cat(weights), factor, scheme, self._method)
                parts = _split(whole, list(map(len, weights)))
                done |= {name: Rounded(part, notes) for name, part in zip(alike, parts, strict=True)}
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


def _largest_of_port(name: str, unit: Unit, statistics: UnitStatistics) -> Tensor | None:
    """The largest magnitude among linears of one input, which an engine fuses and gives one scale of the whole."""
    if isinstance(unit.linears[name], ExpertLinear):
        return None
    names = [one for one in unit.specs if one == name or statistics.shares_port(one, name)]
    largest = [_weight(unit.linears[one]).abs().amax().to(torch.float32) for one in names]
    return torch.stack(largest).amax().view(1)


def _expert_grams(bank: str, statistics: UnitStatistics) -> list[Tensor]:
    grams = statistics.get_experts(bank, Gram)
    return [seen_gram(gram, f"{bank}, expert {index}", UNCALIBRATED) for index, gram in enumerate(grams)]


def _energy(observed: ChannelEnergy, linear: str) -> Tensor:
    """The energies of an input, float32, which must have been seen and be finite."""
    if observed.squares is None:
        raise no_token(linear, "what its errors cost", UNCALIBRATED)
    if not observed.squares.isfinite().all():
        raise not_finite(linear)
    return observed.squares.to(torch.float32)
