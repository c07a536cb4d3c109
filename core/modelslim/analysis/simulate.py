# SPDX-License-Identifier: Apache-2.0
"""Linears quantized as entries of ``process`` say, without a run: in memory, for a look at what it costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from modelslim.coverage import cover
from modelslim.errors import Diagnostic, ProtocolError
from modelslim.model_info import ModelInfo
from modelslim.plan_checks import Checks, Step, with_scale_dtypes
from modelslim.ports import Kinds, PortCollector
from modelslim.protocol.document import Document
from modelslim.quantized import QuantizedLinear
from modelslim.registry import Registry
from modelslim.saver import Saver
from modelslim.unit_statistics import UnitStatistics


class Simulation:
    """What some entries of ``process`` make of the linears of a unit.

    Entries that quantize no linear, such as smoothing, are left out.

    Attributes:
        steps: the algorithms that quantize linears.

    Args:
        document: the protocol that holds the entries, for the places of mistakes.
        entries: the entries, with their places in the document.
        info: the structure of the model.
        registry: the installed plugins.
        saver: whose engine holds the scales; None for float32 scales.

    Raises:
        ProtocolError: an entry does not fit the model; carries every mistake.
    """

    def __init__(
        self,
        document: Document,
        entries: Sequence[tuple[tuple[str | int, ...], Mapping[str, Any]]],
        info: ModelInfo,
        registry: Registry,
        saver: Saver | None = None,
    ) -> None:
        diagnostics: list[Diagnostic] = []
        steps: Sequence[Step] = Checks(document, info, diagnostics).steps(entries, registry)
        if diagnostics:
            raise ProtocolError(f"{document.file} does not fit the model", diagnostics=diagnostics)
        if saver is not None:
            steps = with_scale_dtypes(steps, saver, info.dtype)
        self.steps = [step for step in steps if step.specs]
        self._info = info

    def needs(self, unit: str, model: nn.Module) -> dict[str, Kinds]:
        """What the algorithms want to know of the inputs of a unit's linears."""
        needs: dict[str, Kinds] = {}
        for step in self.steps:
            for name, kinds in step.algorithm.needs(step.unit(unit, model)).items():
                needs[name] = needs.get(name, frozenset()) | kinds
        return needs

    def quantize(
        self, unit: str, model: nn.Module, statistics: UnitStatistics, only: Collection[str] | None = None
    ) -> dict[str, QuantizedLinear]:
        """What takes the places of linears.

        Args:
            unit: name of the unit, which is loaded.
            model: the model.
            statistics: what the collector measured.
            only: names of the linears to quantize; None for all that the entries select.
        """
        modules: dict[str, QuantizedLinear] = {}
        for step in self.steps:
            chosen = step if only is None else _restricted(step, only)
            view = chosen.unit(unit, model)
            if view.specs:
                for name, module in chosen.algorithm.apply(view, statistics).items():
                    assert isinstance(module, QuantizedLinear)
                    modules[name] = module
        return modules


def collector_of(simulations: Iterable[Simulation], unit: str, model: nn.Module) -> PortCollector:
    """Measures what some simulations want to know of a unit, in one pass."""
    needs: dict[str, Kinds] = {}
    for simulation in simulations:
        for name, kinds in simulation.needs(unit, model).items():
            needs[name] = needs.get(name, frozenset()) | kinds
    return PortCollector({name: model.get_submodule(name) for name in needs}, needs)


def statistics_of(ports: PortCollector, tokens: int) -> UnitStatistics:
    """What was measured in a unit; experts without a token borrow from the others, as in a run by default.

    Args:
        ports: measured it.
        tokens: how many tokens, or calls, entered the unit.

    Raises:
        QuantizationError: no expert of a layer saw a token.
    """
    if tokens:
        cover(ports, sorted(ports.wanted), "fallback")
    return ports.statistics()


def _restricted(step: Step, only: Collection[str]) -> Step:
    return replace(step, specs={name: spec for name, spec in step.specs.items() if name in only})
