# SPDX-License-Identifier: Apache-2.0
"""``autoround_quant``: integer weights whose rounding is trained on the output of the unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import (
    Algorithm,
    ChannelEnergy,
    ExpertLinear,
    Gram,
    LinearInfo,
    Pattern,
    Problem,
    QuantizedExperts,
    QuantizedLinear,
    QuantSpec,
    Statistic,
    TensorRange,
    TensorSpec,
    Unit,
    UnitStatistics,
    carry_input_multiplier,
    check_group_sizes,
    choose_samples,
    seen_range,
    static_scale,
)
from modelslim_autoround.config import AutoRoundConfig
from modelslim_autoround.simulated import InputRounding, SimulatedExperts, SimulatedLinear
from modelslim_autoround.start import Factor, best_ratios, factor, moved_values
from modelslim_autoround.training import Descent
from modelslim_autoround.weight import TrainedWeight


class AutoRoundQuant(Algorithm):
    """Trains the rounding of each unit's weights. Activations are float, static or computed per token."""

    takes_experts = True
    compensates = True

    def __init__(self, config: AutoRoundConfig) -> None:
        self._config = config
        self.replays = config.training.trains
        # A static range wants all that there is.
        static = any(strategy.spec.is_static for strategy in config.strategies)
        self.samples = None if static else config.training.samples

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoRoundQuant:
        """Make it from an entry of ``process``."""
        return cls(AutoRoundConfig.parse(config))

    def patterns(self) -> Sequence[Pattern]:
        """``include`` and ``exclude`` of every strategy."""
        return [
            (("strategies", index, *place), pattern)
            for index, strategy in enumerate(self._config.strategies)
            for place, pattern in strategy.selector.patterns()
        ]

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """What the first strategy that selects a linear says."""
        chosen: dict[str, QuantSpec] = {}
        for strategy in self._config.strategies:
            for linear in strategy.selector.select(linears):
                chosen.setdefault(linear.name, strategy.spec)
        return chosen

    def check(self, linears: Sequence[LinearInfo]) -> Sequence[Problem]:
        """Refuse group sizes that do not divide the inputs of a selected linear."""
        specs = self.select(linears)
        chosen = [(one, specs[one.name].weight) for one in linears if one.name in specs]
        return check_group_sizes(chosen, ("strategies",))

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """What the start wants to know of the inputs, and their range for static activations."""
        wanted: dict[str, frozenset[type[Statistic]]] = {}
        for name, spec in unit.specs.items():
            kinds: set[type[Statistic]] = {TensorRange} if spec.is_static else set()
            if self.replays and unit.module is not None and self._config.training.start != "minmax":
                kinds.add(self._moments(unit.linears[name]))
            if kinds:
                wanted[name] = frozenset(kinds)
        return wanted

    def _moments(self, linear: nn.Module) -> type[Statistic]:
        """The second moments that the start wants; of all experts together, whole matrices would be too many."""
        return ChannelEnergy if self._config.training.start == "mse" or isinstance(linear, ExpertLinear) else Gram

    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Train the linears that the plan gave to this entry, all at once."""
        roundings = {name: _rounding(name, unit.linears[name], spec, statistics) for name, spec in unit.specs.items()}
        weights = {name: TrainedWeight(_weight(unit.linears[name]), spec.weight) for name, spec in unit.specs.items()}
        if self.replays and unit.module is not None and unit.calls and weights:
            self._train(unit, weights, roundings, statistics)
        return {
            name: _quantized(unit.linears[name], weight, spec, roundings[name])
            for (name, weight), spec in zip(weights.items(), unit.specs.values(), strict=True)
        }

    def _train(
        self,
        unit: Unit,
        weights: Mapping[str, TrainedWeight],
        roundings: Mapping[str, InputRounding],
        statistics: UnitStatistics,
    ) -> None:
        training = self._config.training
        calls, targets = (choose_samples(one, training.samples) for one in (unit.calls, unit.targets))
        simulated = {name: _simulated(unit.linears[name], weight, roundings[name]) for name, weight in weights.items()}
        with _in_place(unit, simulated):
            descent = Descent(unit.name, list(weights.values()), calls, targets, training, unit.ranks)
            descent.keep_best()
            if training.start != "minmax":
                self._start(unit, weights, statistics)
                descent.keep_best()
            descent.run()
            descent.keep_best()
            descent.restore_best()

    def _start(self, unit: Unit, weights: Mapping[str, TrainedWeight], statistics: UnitStatistics) -> None:
        """Begin with ranges, and for ``gptq`` with values, that suit the inputs."""
        factors: dict[int, Factor] = {}
        own: dict[str, list[Tensor | None]] = {}
        turns: dict[int | str, int] = {}
        for name, weight in weights.items():
            linear, spec = unit.linears[name], unit.specs[name].weight
            matrix: Tensor | None = None
            if self._moments(linear) is Gram:
                matrix = statistics.get(name, Gram).matrix
                energy = None if matrix is None else matrix.diagonal()
            else:
                energy = _energy(name, linear, statistics)
            if energy is None:  # no sample reached it
                continue
            # Linears that read the same tensor share its factor, and so a rank.
            if (
                turns.setdefault(name if matrix is None else id(matrix), len(turns)) % unit.ranks.size
                != unit.ranks.rank
            ):
                continue
            ratios = best_ratios(_weight(linear), spec, energy)
            moved: Tensor | None = None
            if matrix is not None:
                weight.start_at(ratios, ratios.clone())
                if id(matrix) not in factors:
                    factors[id(matrix)] = factor(matrix, name)
                moved = moved_values(_weight(linear), factors[id(matrix)], *weight.scale(), spec)
            own[name] = [ratios, moved]
        for part in unit.ranks.gather(own):
            for name, (ratios, moved) in part.items():
                weights[name].start_at(ratios, ratios.clone(), moved)


def _energy(name: str, linear: nn.Module, statistics: UnitStatistics) -> Tensor | None:
    """Sums of squares of the inputs, float32 [in] or [experts, in]; None when no sample reached a linear."""
    if isinstance(linear, ExpertLinear):
        none = linear.weight.new_zeros(linear.in_features, dtype=torch.float64)
        seen = [one.squares for one in statistics.get_experts(name, ChannelEnergy)]
        return torch.stack([none if one is None else one for one in seen]).to(torch.float32)
    squares = statistics.get(name, ChannelEnergy).squares
    return None if squares is None else squares.to(torch.float32)


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, (nn.Linear, ExpertLinear))
    return linear.weight.detach()


def _simulated(linear: nn.Module, weight: TrainedWeight, rounding: InputRounding) -> nn.Module:
    if isinstance(linear, ExpertLinear):
        return carry_input_multiplier(linear, SimulatedExperts(linear, weight, rounding))
    assert isinstance(linear, nn.Linear)
    return carry_input_multiplier(linear, SimulatedLinear(linear, weight, rounding))


def _quantized(linear: nn.Module, weight: TrainedWeight, spec: QuantSpec, rounding: InputRounding) -> QuantizedLinear:
    assert isinstance(linear, (nn.Linear, ExpertLinear))
    kind = QuantizedExperts if isinstance(linear, ExpertLinear) else QuantizedLinear
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return kind(weight.quantized(), spec, bias, rounding.scale, rounding.offset)


def _rounding(name: str, linear: nn.Module, spec: QuantSpec, statistics: UnitStatistics) -> InputRounding:
    if not spec.is_static:
        return InputRounding(spec.activation)
    if isinstance(linear, ExpertLinear):
        ranges = statistics.get_experts(name, TensorRange)
        parts = [_static(one, spec.activation, f"{name}, expert {index}") for index, one in enumerate(ranges)]
        scale, offset = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    else:
        scale, offset = _static(statistics.get(name, TensorRange), spec.activation, name)
    return InputRounding(spec.activation, scale, offset)


def _static(observed: TensorRange, spec: TensorSpec, linear: str) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and offset int8 [1] of an input whose range was observed."""
    return static_scale(*seen_range(observed, linear, "quantize its activations per_token"), spec)


@contextmanager
def _in_place(unit: Unit, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let other modules stand in the unit for a while."""
    assert unit.module is not None
    inside = unit.module
    places = {name.removeprefix(f"{unit.name}."): module for name, module in modules.items()}
    originals = {place: inside.get_submodule(place) for place in places}
    for place, module in places.items():
        inside.set_submodule(place, module)
    try:
        yield
    finally:
        for place, module in originals.items():
            inside.set_submodule(place, module)
