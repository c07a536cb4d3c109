# SPDX-License-Identifier: Apache-2.0
"""The engine: reads, calibrates, quantizes, hands to the writer and releases one unit after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import nn

from modelslim.activations import Boundary
from modelslim.algorithm import Unit
from modelslim.coverage import cover
from modelslim.devices import synchronize, work_alone
from modelslim.errors import QuantizationError
from modelslim.experts import FusedExperts
from modelslim.loader import Loader
from modelslim.plan import Plan
from modelslim.ports import Kinds, PortCollector
from modelslim.quantized import QuantizedLinear
from modelslim.result import ResultWriter
from modelslim.statistics import UnitStatistics
from modelslim.types import QuantSpec

OUTSIDE = ""
"""Stands for a unit: the linears outside all units, worked on after the last one."""


class Engine:
    """Runs a plan: one unit resident, the next one being read, the last one being written.

    Args:
        plan: the plan.
        writer: takes the result.
    """

    def __init__(self, plan: Plan, writer: ResultWriter) -> None:
        self._plan = plan
        self._writer = writer
        self._units = list(plan.info.units)
        self._model = plan.session.init_model(plan.device) if plan.samples else plan.model
        self._loader = Loader(self._model, plan.checkpoint, plan.loader.sources, plan.device)
        self._policy = plan.protocol.experts
        self._last_pass = self._find_last_pass()
        self._records: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Do the work.

        Returns:
            One record per unit: name, seconds by phase, scheme of every quantized linear, tokens, those of
            each fused expert, and experts whose statistics are those of others.
        """
        outside = PortCollector(self._linears(OUTSIDE), self._needs(self._views(OUTSIDE)))
        with torch.no_grad(), ThreadPoolExecutor(1, "reader", work_alone) as reader, outside, ExitStack() as stack:
            # The embeddings come and go before the first unit comes, so that they do not add up.
            boundary = stack.enter_context(closing(self._start(outside))) if self._plan.samples else None
            ahead = reader.submit(self._loader.read, self._names(0))
            for index, unit in enumerate(self._units):
                clock = _Clock(self._plan.device)
                self._plan.session.unit_started(unit, index, self._total)
                self._loader.install(ahead.result())
                if index + 1 < len(self._units):
                    ahead = reader.submit(self._loader.read, self._names(index + 1))
                clock.lap("read")
                self._unit(index, boundary, outside, clock)
            if self._claimed(OUTSIDE):
                self._outside(outside.statistics())
            done = self._plan.replaced.union(*map(self._stored, self._units))
            self._writer.put(OUTSIDE, {}, [key for key in self._plan.checkpoint.tensors if key not in done])
        return self._records

    def _start(self, outside: PortCollector) -> Boundary:
        plan = self._plan
        self._loader.fill_on_demand(self._units)
        if plan.session.has("enable_kv_cache"):
            plan.session.enable_kv_cache(self._model, False)
        inputs = plan.session.handle_dataset(plan.samples, plan.device)
        boundary = Boundary(plan.session, self._model, inputs, self._units)
        outside.next_sample()
        # Every sample has passed the embeddings, which weigh as much as several units.
        self._loader.release_filled()
        return boundary

    def _unit(self, index: int, boundary: Boundary | None, outside: PortCollector, clock: _Clock) -> None:
        unit = self._units[index]
        views = self._views(unit)
        needs = self._needs(views)
        ports = PortCollector(self._linears(unit), needs)
        tokens = 0
        layers = self._expert_layers(unit)
        if boundary is not None and index <= self._last_pass:
            for name, layer in layers.items():
                layer.count_tokens()
                # Only what is measured has to see more than its tokens.
                layer.show_all = self._policy == "all" and any(one.startswith(f"{name}.") for one in needs)

            def after_sample() -> None:
                ports.next_sample()
                outside.next_sample()

            with ports:
                tokens = boundary.run_unit(unit, after_sample, resume=index < self._last_pass)
            if index + 1 < len(self._units):
                # A forward that embeds its text behind the vision tower has filled the embeddings here.
                self._loader.release_filled()
        borrowed = cover(ports, list(needs), self._policy) if tokens else []
        clock.lap("calibrate")
        modules = self._quantize(views, ports.statistics())
        clock.lap("quantize")
        copies = [key for key in self._stored(unit) if key not in self._plan.replaced]
        self._writer.put(unit, modules, copies)
        self._loader.release(self._names(index))
        clock.lap("write")
        experts = {name: {"tokens": layer.tokens_seen} for name, layer in layers.items() if tokens}
        self._finish(unit, index, clock, {"tokens": tokens, "experts": experts, "borrowed": borrowed})

    def _outside(self, statistics: UnitStatistics) -> None:
        """Quantize what lies outside the units; each weight is read here if no forward needed it."""
        clock = _Clock(self._plan.device)
        self._plan.session.unit_started("outside the units", len(self._units), self._total)
        names = [name for name in self._parameters(self._claimed(OUTSIDE)) if self._loader.is_empty(name)]
        self._loader.install(self._loader.read(names))
        clock.lap("read")
        self._writer.put(OUTSIDE, self._quantize(self._views(OUTSIDE), statistics), [])
        clock.lap("quantize")
        self._finish(OUTSIDE, len(self._units), clock, {"tokens": 0})

    def _quantize(self, views: Sequence[Unit], statistics: UnitStatistics) -> dict[str, QuantizedLinear]:
        """Run the algorithms; what replaces linears, by name, on the CPU."""
        replaced: dict[str, nn.Module] = {}
        for step, view in zip(self._plan.steps, views, strict=True):
            replaced.update(step.algorithm.apply(view, statistics))
        result = {}
        for name, module in replaced.items():
            if not isinstance(module, QuantizedLinear):
                raise QuantizationError(f"{name}: an algorithm put {type(module).__name__} in its place")
            result[name] = module.to("cpu")
        return result

    def _expert_layers(self, unit: str) -> dict[str, FusedExperts]:
        modules = self._model.get_submodule(unit).named_modules(prefix=unit)
        return {name: module for name, module in modules if isinstance(module, FusedExperts)}

    def _finish(self, unit: str, index: int, clock: _Clock, seen: Mapping[str, Any]) -> None:
        linears = {name: spec.scheme for name, spec in self._claimed(unit).items()}
        record = {"unit": unit, "seconds": clock.laps, "linears": linears, **seen}
        self._records.append(record)
        self._plan.session.unit_finished(unit, index, self._total, record)

    @property
    def _total(self) -> int:
        return len(self._units) + bool(self._claimed(OUTSIDE))

    def _claimed(self, unit: str) -> dict[str, QuantSpec]:
        """What the modules of the unit become whose linears are quantized, by name."""
        specs = self._plan.specs
        return {one.module: specs[one.name] for one in self._plan.info.by_unit[unit] if one.name in specs}

    def _linears(self, unit: str) -> Mapping[str, nn.Module]:
        return {name: self._model.get_submodule(name) for name in self._plan.info.holders[unit]}

    def _views(self, unit: str) -> list[Unit]:
        """The unit as each step sees it."""
        linears = self._linears(unit)
        return [step.unit(unit, linears) for step in self._plan.steps]

    def _needs(self, views: Sequence[Unit]) -> dict[str, Kinds]:
        needs: dict[str, Kinds] = {}
        for step, view in zip(self._plan.steps, views, strict=True):
            for name, kinds in step.algorithm.needs(view).items():
                needs[name] = needs.get(name, frozenset()) | kinds
        return needs

    def _find_last_pass(self) -> int:
        """Index of the last unit that samples must pass; beyond the units when the linears outside want them."""
        if not self._plan.samples:
            return -1
        if self._needs(self._views(OUTSIDE)):
            return len(self._units)
        return max(index for index, unit in enumerate(self._units) if self._needs(self._views(unit)))

    def _names(self, index: int) -> list[str]:
        """What must be read of a unit: all of it to run it, else what is quantized."""
        unit = self._units[index]
        return self._loader.names(unit) if index <= self._last_pass else self._parameters(self._claimed(unit))

    def _parameters(self, modules: Iterable[str]) -> list[str]:
        return [name for module in modules for name in self._loader.names(module)]

    def _stored(self, unit: str) -> list[str]:
        """Stored tensors of a unit, in the order of its parameters."""
        keys = (key for name in self._loader.names(unit) for key in self._loader.source(name).keys)
        return list(dict.fromkeys(keys))


class _Clock:
    """Seconds by phase."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.laps[phase] = round(now - self._last, 6)
        self._last = now
