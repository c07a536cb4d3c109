# SPDX-License-Identifier: Apache-2.0
"""The engine: reads, calibrates, quantizes, hands to the writer and releases one unit after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from modelslim.activations import Boundary
from modelslim.batches import batched
from modelslim.devices import synchronize, work_alone
from modelslim.edits import stored_edits
from modelslim.inputs import model_inputs
from modelslim.kv_cache import QuantizedCache, attentions, open_places
from modelslim.loader import Loader
from modelslim.memory import Trimmer
from modelslim.plan import Plan
from modelslim.ports import PortCollector
from modelslim.quantized import QuantizedLinear
from modelslim.ranks import ALONE, Ranks, merge_order
from modelslim.result import RunOutput
from modelslim.runners.finished import FinishedUnits
from modelslim.runners.standing import in_place
from modelslim.runners.stream import Stream
from modelslim.runners.work import Outcome, UnitWork
from modelslim.sampling import tokens_of
from modelslim.spill import make_spill
from modelslim.statistics import UnitStatistics

OUTSIDE = ""
"""Stands for a unit: the linears outside all units, worked on after the last one."""


class Engine:
    """Runs a plan: one unit resident, the next one being read, the last one being written.

    Args:
        plan: the plan.
        writer: takes the result.
        ranks: who shares the work; all run their engines on the same plan.
        whole: hold all units from the start, instead of one after the other.
    """

    def __init__(self, plan: Plan, writer: RunOutput, ranks: Ranks = ALONE, whole: bool = False) -> None:
        self._plan = plan
        self._ranks = ranks
        self._whole = whole
        self._writer = writer
        self._units = list(plan.info.units)
        self._model = plan.session.init_model(plan.device) if plan.samples else plan.model
        if self._model is not plan.model:
            open_places(self._model, attentions(plan.planned.caches))
        self._loader = Loader(self._model, plan.checkpoint, plan.loader.sources, plan.device)
        self._last_pass = self._find_last_pass()
        self._done = len(writer.finished)
        self._finished = FinishedUnits(plan, writer, self._model, ranks)
        self._reference: Stream | None = None
        self._records: list[dict[str, Any]] = []
        self._written: set[str] = set()

    def run(self) -> list[dict[str, Any]]:
        """Do the work.

        Returns:
            One record per unit: name, seconds by phase, scheme and quality of every quantized linear,
            what fell back, tokens, those of each fused expert, and experts whose statistics are those of others.
        """
        outside = self._work(OUTSIDE).collector()
        with torch.no_grad(), ThreadPoolExecutor(1, "reader", work_alone) as reader, outside, ExitStack() as stack:
            # The embeddings come and go before the first unit comes, so that they do not add up.
            stream = self._start(outside, stack) if self._done <= self._last_pass else None
            first = 0 if stream is not None else min(self._done, len(self._units))
            for index in range(first):
                self._skip(index)
            if self._whole:
                for index in range(first, len(self._units)):
                    self._loader.install(self._loader.read(self._names(index)))
            ahead = reader.submit(self._read, first) if first < len(self._units) else None
            trimmer = Trimmer()
            for index, unit in enumerate(self._units[first:], start=first):
                assert ahead is not None
                clock = _Clock(self._plan.device)
                self._plan.session.unit_started(unit, index, self._total)
                self._loader.install(ahead.result())
                following = index + 1 if index + 1 < len(self._units) else None
                ahead = reader.submit(self._read, following) if following and self._plan.costs.layout.ahead else None
                clock.lap("read")
                if stream is not None and index < self._done:
                    self._pass_again(index, stream)
                else:
                    self._unit(index, stream, clock)
                trimmer.look()
                if following and ahead is None:
                    self._writer.wait()
                    ahead = reader.submit(self._read, following)
            if self._plan.claimed(OUTSIDE):
                if len(self._units) < self._done:
                    self._skip(len(self._units))
                else:
                    self._outside(outside.statistics())
            copies = [key for key in self._plan.checkpoint.tensors if key not in self._written]
            if self._done <= self._total:
                self._writer.put(OUTSIDE, {}, {}, {}, copies)
        return self._records

    def _read(self, index: int) -> dict[str, Tensor]:
        """What a unit holds, unless it is there already."""
        return {} if self._whole else self._loader.read(self._names(index))

    def _start(self, outside: PortCollector, stack: ExitStack) -> Stream:
        """Let every sample run to its first unit; twice when float outputs are wanted behind quantized units."""
        plan = self._plan
        self._loader.fill_on_demand(self._units)
        if plan.session.has("enable_kv_cache"):
            plan.session.enable_kv_cache(self._model, False)
        inputs = model_inputs(plan.session, plan.samples, plan.device, plan.calib_length)
        if not plan.replays:  # an algorithm that runs the unit itself counts samples
            inputs = batched(inputs)
        rounds = merge_order([tokens_of(one) for one in inputs], self._ranks.size)[self._ranks.rank]
        numbers = [number for group in rounds for number in group]
        place = {number: index for index, number in enumerate(numbers)}
        own = [inputs[number] for number in numbers]
        places = [[place[number] for number in group] for group in rounds]
        spill = make_spill(plan.costs.layout, self._writer.path, self._model, inputs)
        if spill is not None:
            stack.enter_context(closing(spill))

        def stream(around: Callable[[], AbstractContextManager[None]], measured: PortCollector | None) -> Stream:
            forwards = Boundary(plan.session, self._model, own, self._units, around, spill)
            boundary = stack.enter_context(closing(forwards))
            made = Stream(boundary, numbers, places, self._ranks, measured)
            made.start()
            return made

        main = stream(nullcontext, outside)
        if plan.propagates_quantized and plan.replays:
            self._reference = stream(outside.paused, None)
        # Every sample has passed the embeddings, which weigh as much as several units.
        self._loader.release_filled()
        return main

    def _skip(self, index: int) -> None:
        """Take over what an earlier run has done for a unit, which no sample must pass."""
        name = self._units[index] if index < len(self._units) else "outside the units"
        self._plan.session.unit_started(name, index, self._total)
        self._take_over(index)

    def _take_over(self, index: int) -> None:
        done = self._writer.finished[index]
        assert done.report is not None
        stored = self._stored(done.unit) if done.unit else []
        self._written.update(stored, self._replaced(done.modules, done.edited))
        self._records.append(dict(done.report))
        self._plan.session.unit_finished(done.unit, index, self._total, done.report)

    def _pass_again(self, index: int, stream: Stream) -> None:
        """Let the samples pass a unit that an earlier run has finished, as they passed it then."""
        unit = self._units[index]
        work = self._work(unit)
        standing = self._finished.standing(index) if self._plan.propagates_quantized else None
        if standing is not None:
            if self._reference is not None:
                self._reference.run(unit)
            for name, tensor in standing.edited.items():
                self._model.get_parameter(name).copy_(tensor)
            modules = {name: module.to(self._plan.device) for name, module in standing.modules.items()}
            with in_place(self._model, modules):
                stream.run(unit)
        elif work.passes_source and not self._plan.propagates_quantized:
            stream.run(unit)
        else:  # what the samples passed is not kept, and the same work gives it again
            work.calibrate(stream, True, self._reference)
        if index + 1 < len(self._units):
            self._loader.release_filled()
        self._loader.release(self._names(index))
        self._take_over(index)

    def _unit(self, index: int, stream: Stream | None, clock: _Clock) -> None:
        unit = self._units[index]
        work = self._work(unit)
        if stream is not None and index <= self._last_pass:
            # Behind the last unit lie the norm and the vocabulary projection, which cost as much as several units.
            resume = index + 1 < len(self._units) or self._last_pass == len(self._units)
            outcome = work.calibrate(stream, resume, self._reference)
            if index + 1 < len(self._units):
                # A forward that embeds its text behind the vision tower has filled the embeddings here.
                self._loader.release_filled()
        else:
            outcome = work.work(UnitStatistics({}))
        clock.lap("calibrate and quantize")
        self._write(unit, index, clock, outcome, self._stored(unit))
        self._loader.release(self._names(index))

    def _outside(self, statistics: UnitStatistics) -> None:
        """Quantize what lies outside the units; each weight is read here if no forward needed it."""
        clock = _Clock(self._plan.device)
        self._plan.session.unit_started("outside the units", len(self._units), self._total)
        names = [name for name in self._parameters(self._plan.claimed(OUTSIDE)) if self._loader.is_empty(name)]
        self._loader.install(self._loader.read(names))
        clock.lap("read")
        outcome = self._work(OUTSIDE).work(statistics)
        clock.lap("quantize")
        self._write(OUTSIDE, len(self._units), clock, outcome, [])

    def _write(self, unit: str, index: int, clock: _Clock, outcome: Outcome, stored: Sequence[str]) -> None:
        """Hand on what was quantized and edited, and what of the unit's tensors is left to copy."""
        record = {"unit": unit, "seconds": clock.laps, **outcome.record}
        self._records.append(record)
        if self._ranks.is_first:
            self._put(unit, clock, outcome, stored, record)
        self._plan.session.unit_finished(unit, index, self._total, record)

    def _put(
        self, unit: str, clock: _Clock, outcome: Outcome, stored: Sequence[str], record: Mapping[str, Any]
    ) -> None:
        modules: dict[str, QuantizedLinear] = {name: module.to("cpu") for name, module in outcome.modules.items()}
        caches: dict[str, QuantizedCache] = {name: one.to("cpu") for name, one in outcome.caches.items()}
        edited = dict(stored_edits(self._plan, self._model, outcome.edited))
        gone = self._replaced(modules, outcome.edited)
        copies = [key for key in stored if key not in gone]
        self._written.update(stored, gone)
        self._writer.wait()
        clock.lap("write")
        self._writer.put(unit, modules, caches, edited, copies, sorted(outcome.edited), record)

    def _replaced(self, modules: Iterable[str], edited: Iterable[str]) -> set[str]:
        """Stored tensors in whose place others were written."""
        parameters = [*edited, *(f"{name}.{part}" for name in modules for part in ("weight", "bias"))]
        return {key for name in parameters for key in self._plan.stored_keys(name)}

    def _work(self, unit: str) -> UnitWork:
        return UnitWork(self._plan, self._model, unit, self._ranks)

    @property
    def _total(self) -> int:
        return len(self._units) + bool(self._plan.claimed(OUTSIDE))

    def _find_last_pass(self) -> int:
        """Index of the last unit that samples must pass; beyond the units when the linears outside want them."""
        if not self._plan.samples:
            return -1
        if self._work(OUTSIDE).calibrates:
            return len(self._units)
        return max(index for index, unit in enumerate(self._units) if self._work(unit).calibrates)

    def _names(self, index: int) -> list[str]:
        """What must be read of a unit: all of it to run it, else what is quantized."""
        unit = self._units[index]
        if index <= self._last_pass:
            return self._loader.names(unit)
        return self._parameters(self._plan.claimed(unit))

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
