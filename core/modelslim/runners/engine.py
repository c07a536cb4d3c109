# SPDX-License-Identifier: Apache-2.0
"""The engine: reads, calibrates, quantizes, hands to the writer and releases one unit after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelslim.activations import Boundary
from modelslim.batches import batched
from modelslim.debug_info import write_unit
from modelslim.devices import peak_device_memory, synchronize, work_alone
from modelslim.edits import edited_parameters, stored_edits
from modelslim.inputs import model_inputs
from modelslim.loader import Loader
from modelslim.memory import Trimmer
from modelslim.merge_order import merge_order
from modelslim.overlay import Left, StageWriter
from modelslim.plan import Plan
from modelslim.ports import PortCollector
from modelslim.ranks import ALONE, Ranks
from modelslim.report import peak_memory
from modelslim.result import RunOutput, UnitResult
from modelslim.runners.finished import FinishedUnits
from modelslim.runners.lens import Lens
from modelslim.runners.standing import in_place
from modelslim.runners.stream import Stream
from modelslim.runners.work import Outcome, UnitWork
from modelslim.sampling import tokens_of
from modelslim.spill import make_spill
from modelslim.transfers import Arrival, departure
from modelslim.unit_statistics import UnitStatistics

OUTSIDE = ""
"""Stands for a unit: the linears outside all units, worked on after the last one."""
_KL = "KL per layer"


@dataclass
class Held:
    """What all stages of a run share.

    Attributes:
        model: the one instance of the model.
        loader: fills it.
        started: how many units the stages before have worked on, for observers.
        total: how many units all stages work on.
        ranks: who shares the work; all run their engines on the same plan.
        whole: hold all units from the start of a stage, instead of one after the other.
    """

    model: nn.Module
    loader: Loader
    started: int = 0
    total: int = 0
    ranks: Ranks = ALONE
    whole: bool = False


class Engine:
    """Runs one stage of a plan: one unit resident, the next one being read, the last one being written.

    Args:
        plan: the plan of the stage.
        writer: takes the result.
        held: what the stages share.
        stage: takes what a prior stage changes, at the rank that writes; None for the main one.
    """

    def __init__(self, plan: Plan, writer: RunOutput, held: Held, stage: StageWriter | None = None) -> None:
        self._plan = plan
        self._ranks = held.ranks
        self._whole = held.whole
        self._writer = writer
        self._held = held
        self._stage = stage
        self._overlay = writer.overlay
        self._units = list(plan.info.units)
        self._model = held.model
        self._loader = held.loader
        self._last_pass = self._find_last_pass()
        self._done = len(writer.finished)
        self._finished = FinishedUnits(plan, writer, self._model, held.ranks)
        self._reference: Stream | None = None
        self._lens: Lens | None = None
        self._records: list[dict[str, Any]] = []
        self._written: set[str] = set()

    def run(self) -> list[dict[str, Any]]:
        """Do the work.

        Returns:
            One record per unit: name, seconds by phase, scheme and quality of every quantized linear,
            what fell back, tokens, those of each fused expert, and experts whose statistics are those of others.
        """
        outside = self._work(OUTSIDE).collector()
        pool = ThreadPoolExecutor(1, "reader", work_alone, (self._plan.device,))
        with torch.no_grad(), pool as reader, outside, ExitStack() as stack:
            # The embeddings come and go before the first unit comes, so that they do not add up.
            if self._done <= self._last_pass:
                stack.enter_context(self._applied(OUTSIDE, self._left(OUTSIDE)))
            stream = self._start(outside, stack) if self._done <= self._last_pass else None
            first = 0 if stream is not None else min(self._done, len(self._units))
            for index in range(first):
                self._skip(index)
            if self._whole:
                for index in range(first, len(self._units)):
                    self._loader.install(self._loader.read(self._names(index)))
            ahead = reader.submit(self._read, first) if first < len(self._units) else None
            trimmer = Trimmer(is_scarce=self._plan.budget.host is not None)
            for index, unit in enumerate(self._units[first:], start=first):
                assert ahead is not None
                clock = _Clock(self._plan.device)
                self._plan.session.unit_started(unit, self._held.started + index, self._held.total)
                self._loader.install(ahead.result().take())
                following = index + 1 if index + 1 < len(self._units) else None
                ahead = reader.submit(self._read, following) if following and self._plan.costs.layout.ahead else None
                left = self._left(unit)
                clock.lap("read")
                with self._applied(unit, left):
                    if stream is not None and index < self._done:
                        self._pass_again(index, stream)
                    else:
                        self._unit(index, stream, clock, left)
                trimmer.look()
                if following and ahead is None:
                    self._writer.wait()
                    ahead = reader.submit(self._read, following)
            if self._plan.works_outside:
                if len(self._units) < self._done:
                    self._skip(len(self._units))
                else:
                    self._outside(outside.statistics())
            copies = [key for key in self._plan.checkpoint.tensors if key not in self._written]
            if self._plan.stage is None and self._done <= self._total:
                self._writer.put(UnitResult(copies=copies))
        return self._records

    def _read(self, index: int) -> Arrival:
        """What a unit holds, unless it is there already."""
        return Arrival({}) if self._whole else self._loader.read_ahead(self._names(index))

    def _start(self, outside: PortCollector, stack: ExitStack) -> Stream:
        """Let every sample run to its first unit; twice when float outputs are wanted behind quantized units."""
        plan = self._plan
        self._loader.fill_on_demand(self._units)
        if plan.session.has("enable_kv_cache"):
            plan.session.enable_kv_cache(self._model, False)
        singles = model_inputs(plan.session, plan.samples, plan.device, plan.calib_length)
        # An algorithm that runs the unit itself counts samples.
        inputs = singles if plan.replays else batched(singles)
        order = merge_order([tokens_of(one) for one in inputs], self._ranks.size)
        numbers = [number for groups in order.ranks[self._ranks.rank] for group in groups for number in group]
        own = [inputs[number] for number in numbers]
        spill = make_spill(plan.costs.layout, self._writer.path, self._model, inputs, plan.device)
        if spill is not None:
            stack.enter_context(closing(spill))

        def stream(around: Callable[[], AbstractContextManager[None]], measured: PortCollector | None) -> Stream:
            forwards = Boundary(plan.session, self._model, own, self._units, around, spill)
            boundary = stack.enter_context(closing(forwards))
            made = Stream(boundary, numbers, order, self._ranks, measured)
            made.start()
            return made

        main = stream(nullcontext, outside)
        if plan.propagates_quantized and plan.replays:
            self._reference = stream(outside.paused, None)
        if plan.stage is None:
            passed = self._units[: self._last_pass + 1]
            self._lens = stack.enter_context(closing(Lens(plan, self._model, passed, outside.paused, self._ranks)))
            self._lens.start(singles)
        # Every sample has passed the embeddings, which weigh as much as several units.
        self._loader.release_filled()
        return main

    def _skip(self, index: int) -> None:
        """Take over what an earlier run has done for a unit, which no sample must pass."""
        name = self._units[index] if index < len(self._units) else "outside the units"
        self._plan.session.unit_started(name, self._held.started + index, self._held.total)
        self._take_over(index)

    def _take_over(self, index: int) -> None:
        done = self._writer.finished[index]
        assert done.report is not None
        stored = self._stored(done.unit) if done.unit else []
        self._written.update(stored, self._replaced(done.modules, done.edited))
        self._records.append(dict(done.report))
        self._plan.session.unit_finished(done.unit, self._held.started + index, self._held.total, done.report)

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
            work.drop_multipliers()  # quantized linears have theirs, and float ones none any more
            modules = {name: module.to(self._plan.device) for name, module in standing.modules.items()}
            with in_place(self._model, modules):
                stream.run(unit)
        elif work.passes_source and not self._plan.propagates_quantized:
            stream.run(unit)
        else:  # what the samples passed is not kept, and the same work gives it again
            work.calibrate(stream, True, self._reference)
        if self._lens is not None:
            self._lens.pass_again(index, self._writer.beside(index))
        if index + 1 < len(self._units):
            self._loader.release_filled()
        self._loader.release(self._names(index))
        self._take_over(index)

    def _unit(self, index: int, stream: Stream | None, clock: _Clock, left: Left) -> None:
        unit = self._units[index]
        work = self._work(unit)
        if stream is not None and index <= self._last_pass:
            # Behind the last unit lie the norm and the vocabulary projection, which cost as much as several units.
            resume = index + 1 < len(self._units) or self._last_pass == len(self._units)
            if self._lens is not None:
                clock.lap("read")
                self._lens.pass_float(unit)
                clock.lap(_KL)
            outcome = work.calibrate(stream, resume, self._reference)
            if self._lens is not None:
                clock.lap("calibrate and quantize")
                outcome.kept = self._lens.pass_quantized(index, {**outcome.modules, **outcome.caches})
                clock.lap(_KL)
            if index + 1 < len(self._units):
                # A forward that embeds its text behind the vision tower has filled the embeddings here.
                self._loader.release_filled()
        else:
            outcome = work.work(UnitStatistics({}))
        clock.lap("calibrate and quantize")
        self._write(unit, index, clock, outcome, left, self._stored(unit))

    def _outside(self, statistics: UnitStatistics) -> None:
        """Quantize what lies outside the units; each weight is read here if no forward needed it."""
        clock = _Clock(self._plan.device)
        index = len(self._units)
        self._plan.session.unit_started("outside the units", self._held.started + index, self._held.total)
        names = [name for name in self._parameters(self._plan.claimed(OUTSIDE)) if self._loader.is_empty(name)]
        self._loader.install(self._loader.read(names))
        clock.lap("read")
        outcome = self._work(OUTSIDE).work(statistics)
        clock.lap("quantize")
        self._write(OUTSIDE, index, clock, outcome, self._left(OUTSIDE), [])

    def _write(self, unit: str, index: int, clock: _Clock, outcome: Outcome, left: Left, stored: Sequence[str]) -> None:
        """Hand on what was quantized and edited, also by earlier stages, and what of the unit is left to copy."""
        record = {"unit": unit, "seconds": clock.laps, **clock.memory, **outcome.record}
        self._records.append(record)
        result = None
        if self._stage is not None:
            edits = edited_parameters(self._model, outcome.edited)
            self._stage.put(unit, outcome.modules, outcome.caches, edits, outcome.multipliers)
            clock.lap("write")
        elif self._ranks.is_first:
            result = self._result(unit, outcome, left, stored)
            self._writer.wait()
            clock.lap("write")
        if self._lens is not None and self._ends_measurement(index):
            if result is not None:
                result.arrived()
            self._loader.release(self._names(index))  # its place is for the head
            record["kl"] = self._lens.measure()
            self._loader.release_filled()
            clock.lap(_KL)
        if result is not None:
            self._put(index, result, outcome, record)
        if unit and not self._ends_measurement(index):
            self._loader.release(self._names(index))
        self._plan.session.unit_finished(unit, self._held.started + index, self._held.total, record)

    def _result(self, unit: str, outcome: Outcome, left: Left, stored: Sequence[str]) -> UnitResult:
        """What is written of a unit; it begins to leave the device."""
        quantized, places = {**left.modules, **outcome.modules}, {**left.caches, **outcome.caches}
        held = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
        changed = (left.edited | outcome.edited) - held
        with departure(self._plan.device) as leaving:
            modules = {name: leaving.bring_module(module) for name, module in quantized.items()}
            caches = {name: leaving.bring_module(one) for name, one in places.items()}
            edited = dict(stored_edits(self._plan, self._model, changed, leaving.bring))
        gone = self._replaced(modules, changed)
        self._written.update(stored, gone)
        copies = [key for key in stored if key not in gone]
        return UnitResult(unit, modules, caches, edited, copies, sorted(changed), None, outcome.kept, leaving.wait)

    def _put(self, index: int, result: UnitResult, outcome: Outcome, record: dict[str, Any]) -> None:
        result.report = record
        if self._writer.debug:
            result.arrived()
            write_unit(self._writer.path, index, result.modules, result.caches, outcome.observed, record)
        self._writer.put(result)

    def _ends_measurement(self, index: int) -> bool:
        """True for the last unit that samples pass, where KL per layer is read."""
        return self._lens is not None and index == min(self._last_pass, len(self._units) - 1)

    def _replaced(self, modules: Iterable[str], edited: Iterable[str]) -> set[str]:
        """Stored tensors in whose place others were written."""
        parameters = [*edited, *(f"{name}.{part}" for name in modules for part in ("weight", "bias"))]
        return {key for name in parameters for key in self._plan.stored_keys(name)}

    def _work(self, unit: str) -> UnitWork:
        return UnitWork(self._plan, self._model, unit, self._ranks, self._overlay.context)

    def _left(self, unit: str) -> Left:
        return self._overlay.left(unit, self._plan.info.banks)

    @contextmanager
    def _applied(self, unit: str, left: Left) -> Iterator[None]:
        """Let a unit be, while this is open, what the stages before have made of it."""
        device = self._plan.device
        standing = {name: one.to(device) for name, one in {**left.modules, **left.caches}.items()}
        with self._overlay.applied(self._model, unit, device), in_place(self._model, standing):
            yield

    @property
    def _total(self) -> int:
        return len(self._units) + self._plan.works_outside

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
        quantized = self._overlay.quantized(unit)
        if index <= self._last_pass:
            return [name for name in self._loader.names(unit) if name.rpartition(".")[0] not in quantized]
        claimed = list(self._plan.claimed(unit))
        edited = self._work(unit).edits | (self._overlay.edited(unit) if self._plan.stage is None else frozenset())
        others = {name for name in edited if name.rpartition(".")[0] not in {*claimed, *quantized}}
        return [*self._parameters(claimed), *sorted(others & self._loader.parameters.keys())]

    def _parameters(self, modules: Iterable[str]) -> list[str]:
        return [name for module in modules for name in self._loader.names(module)]

    def _stored(self, unit: str) -> list[str]:
        """Stored tensors of a unit, in the order of its parameters."""
        keys = (key for name in self._loader.names(unit) for key in self._loader.source(name).keys)
        return list(dict.fromkeys(keys))


class _Clock:
    """Seconds by phase, and the largest memory up to the end of each."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.memory: dict[str, dict[str, int]] = {}

    def lap(self, phase: str) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.laps[phase] = round(self.laps.get(phase, 0.0) + now - self._last, 6)
        for kind, peak in (
            ("peak_memory_bytes", peak_memory()),
            ("peak_device_memory_bytes", sum(peak_device_memory(self._device).values())),
        ):
            if peak:
                self.memory.setdefault(kind, {})[phase] = peak
        self._last = now
