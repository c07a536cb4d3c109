# SPDX-License-Identifier: Apache-2.0
"""A subgraph with its modules: where a scale can be folded, what was measured there, and the folding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from modelslim.api import (
    ChannelAbsMean,
    ChannelRange,
    ExpertLinear,
    RowSample,
    Statistic,
    Subgraph,
    Unit,
    UnitStatistics,
    multiply_inputs,
    no_token,
    not_finite,
)
from modelslim_smoothing import fold
from modelslim_smoothing.scales import largest_per_source, limit, per_source, per_target

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Site:
    """A subgraph with its modules.

    Scales are [channels] of the tensor that the targets read; where experts have an up and a down
    projection each, [experts, channels].

    Attributes:
        subgraph: as the adapter describes it.
        source: what makes the tensor; None where it is divided when the model runs.
        targets: all that reads it, by name.
        judged: those of the targets that can be quantized; a router stays float and has no say.
        ports: names of the targets whose inputs are measured: together they see every token.
    """

    subgraph: Subgraph
    source: nn.Module | None
    targets: Mapping[str, nn.Module]
    judged: Mapping[str, nn.Module]
    ports: tuple[str, ...]

    @classmethod
    def find(cls, unit: Unit, subgraph: Subgraph) -> Site:
        """Look up the modules of a subgraph."""
        targets = {name: unit.modules[name] for name in subgraph.targets}
        # What lies outermost sees every token; an expert sees those that came to it.
        depth = min(name.count(".") for name in targets)
        return cls(
            subgraph,
            unit.modules[subgraph.source] if subgraph.source else None,
            targets,
            {name: module for name, module in targets.items() if name in unit.linears},
            tuple(name for name in targets if name.count(".") == depth),
        )

    @property
    def is_norm(self) -> bool:
        """True when the source is a norm."""
        return self.subgraph.type == "norm-linear"

    @property
    def per_expert(self) -> bool:
        """True when every expert has a tensor, and so a scale, of its own."""
        if self.source is None:
            return all(isinstance(target, ExpertLinear) for target in self.targets.values())
        return isinstance(self.source, ExpertLinear)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights which read the tensor."""
        weight: Tensor = next(iter(self.targets.values())).weight  # type: ignore[assignment]
        return weight.dtype

    def weights(self) -> Tensor:
        """``w``, the largest magnitude of each column over the weights that can be quantized."""
        return fold.column_magnitudes(self.judged.values(), per_expert=self.per_expert)

    def ranges(self, statistics: UnitStatistics) -> tuple[Tensor, Tensor]:
        """The smallest and the largest activation of every channel, float32.

        Raises:
            QuantizationError: no token came by, or an activation was not finite.
        """
        low = self._gather(statistics, ChannelRange, lambda one: one.minimum).amin(0)
        high = self._gather(statistics, ChannelRange, lambda one: one.maximum).amax(0)
        if not (low.isfinite() & high.isfinite()).all():
            raise not_finite(self.ports[0])
        return low, high

    def means(self, statistics: UnitStatistics) -> Tensor:
        """The mean magnitude of every channel, float32."""
        return self._gather(statistics, ChannelAbsMean, lambda one: one.mean if one.tokens else None).mean(0)

    def rows(self, statistics: UnitStatistics) -> list[Tensor]:
        """Some tokens as they are, [tokens, channels] float32: of each expert, where each has its own tensor."""
        samples = [sample.rows for port in self._ports(statistics, RowSample) for sample in port]
        if self.per_expert:
            width = max(rows.shape[-1] for rows in samples if rows is not None)
            return [torch.zeros((0, width)) if rows is None else rows.to(torch.float32) for rows in samples]
        return [torch.cat([rows for rows in samples if rows is not None]).to(torch.float32)]

    def limit(self, scale: Tensor) -> Tensor:
        """The scale that can be folded: equal for heads that share a value, and within the range of the dtype."""
        heads, unit_offset = self.subgraph.heads, self.subgraph.unit_offset
        reading = fold.column_magnitudes(self.targets.values(), per_expert=self.per_expert)
        if self.source is None:
            made = torch.zeros_like(reading)
        elif self.is_norm:
            made = fold.gain_magnitudes(self.source, unit_offset=unit_offset)
        else:
            made = fold.row_magnitudes(self.source, self.subgraph.rows)
        # A gain of 1 + weight is stored as a number near 1, which has no fine steps.
        step = torch.finfo(self.dtype).eps if unit_offset else 0.0
        reading = largest_per_source(reading, heads)
        return per_target(limit(per_source(scale, heads), made, reading, self.dtype, step), heads)

    def fold(self, scale: Tensor, shift: Tensor | None, statistics: UnitStatistics) -> None:
        """Change the weights, and let the statistics follow.

        Args:
            scale: as ``limit`` answers it.
            shift: [channels] to subtract before the division; only behind a norm.
            statistics: those of the unit.
        """
        if self.source is None:
            multiplier = 1 / scale
            multiply_inputs(self.targets.values(), multiplier)
            statistics.rescale(self.targets, 1 / multiplier)
            return
        if self.is_norm:
            scale, shift = fold.divide_norm(self.source, scale, shift, unit_offset=self.subgraph.unit_offset)
        else:
            # The scales of a group are equal: a mean could differ from them in the last bit.
            fold.divide_rows(self.source, largest_per_source(scale, self.subgraph.heads), self.subgraph.rows)
        if shift is not None:
            fold.add_shift(self.targets.values(), shift)
        fold.multiply_columns(self.targets.values(), scale)
        statistics.rescale(self.targets, scale, shift)

    def parameters(self, *, shifts: bool = False) -> frozenset[str]:
        """Full names of the parameters that ``fold`` changes or adds."""
        names = {f"{name}.weight" for name in self.targets}
        if self.source is not None:
            names.add(f"{self.subgraph.source}.weight")
            if shifts or fold.bias_of(self.source) is not None:
                names.add(f"{self.subgraph.source}.bias")
        if shifts:
            names.update(f"{name}.bias" for name in self.targets)
        return frozenset(names)

    def _ports(self, statistics: UnitStatistics, kind: type[S]) -> list[list[S]]:
        """What was measured at each port; one that several targets share is there once."""
        found: list[list[S]] = []
        for number, name in enumerate(self.ports):
            if isinstance(self.targets[name], ExpertLinear):
                found.append(statistics.get_experts(name, kind))
            elif not any(statistics.shares_port(name, other) for other in self.ports[:number]):
                found.append([statistics.get(name, kind)])
        return found

    def _gather(self, statistics: UnitStatistics, kind: type[S], value: Callable[[S], Tensor | None]) -> Tensor:
        """A value of all ports, [ports, channels] float32, or [ports, experts, channels]."""
        ports = [[value(one) for one in port] for port in self._ports(statistics, kind)]
        known = [one for port in ports for one in port if one is not None]
        if not known:
            raise no_token(self.ports[0], "the scale of its inputs")
        if self.per_expert:
            # An expert that saw nothing counts as dead, and keeps the scale 1.
            dead = torch.zeros_like(known[0])
            return torch.stack([torch.stack([dead if one is None else one for one in port]) for port in ports]).float()
        return torch.stack(known).to(torch.float32)
