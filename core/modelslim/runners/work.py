# SPDX-License-Identifier: Apache-2.0
"""The work on one unit: measure, run the algorithms, judge what they made, hand on the activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from modelslim.algorithm import Unit
from modelslim.context import Context
from modelslim.coverage import cover
from modelslim.errors import ModelError, QuantizationError
from modelslim.experts import FusedExperts
from modelslim.kv_cache import QuantizedCache
from modelslim.multipliers import (
    drop_input_multiplier,
    input_multiplier,
    shared_multipliers,
    undo_input_multiplier,
)
from modelslim.observed import Observed
from modelslim.plan import Plan
from modelslim.plan_checks import Step, with_held_scales
from modelslim.ports import Kinds, PortCollector
from modelslim.quality import Quality, float_outputs, judge
from modelslim.quantized import QuantizedLinear
from modelslim.ranks import ALONE, Ranks
from modelslim.row_sample import RowSample
from modelslim.runners.shares import Shares
from modelslim.runners.standing import in_place
from modelslim.runners.stream import Stream, gathered_calls
from modelslim.statistics import ChannelRange, TensorRange
from modelslim.types import ProcessRequest, QuantSpec
from modelslim.unit_statistics import UnitStatistics, follows_rescaling

View = tuple[Step, Unit]
Calls = tuple[Sequence[ProcessRequest], Sequence[Any]]


@dataclass
class Outcome:
    """What became of a unit.

    Attributes:
        modules: what replaces linears, by name, on the device.
        caches: what takes the places of key/value caches, by name, on the device.
        edited: names of parameters that were changed in place or added and stay float.
        specs: what the quantized linears became, by the names of the modules that hold them.
        record: for the report.
        multipliers: of a prior stage, linears that share a multiplier of their input and are left to later stages.
        observed: ranges that were measured; references, no copies.
        kept: what is kept beside the result for a run that is continued.
    """

    modules: dict[str, QuantizedLinear] = field(default_factory=dict)
    caches: dict[str, QuantizedCache] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    multipliers: list[tuple[list[str], Tensor]] = field(default_factory=list)
    observed: Observed = field(default_factory=Observed)
    kept: bytes = b""


class UnitWork:
    """One unit of a run, or the linears outside all units.

    Args:
        plan: the plan.
        model: the model in which the unit is, or will be, loaded.
        unit: its name; empty for what lies outside the units.
        ranks: who shares the work.
        context: what stages hand over.
    """

    def __init__(
        self, plan: Plan, model: nn.Module, unit: str, ranks: Ranks = ALONE, context: Context | None = None
    ) -> None:
        self._plan = plan
        self._context = context or Context()
        self._model = model
        self._unit = unit
        self._ranks = ranks
        self._claimed = plan.claimed(unit)
        self._views: list[View] = [(step, replace(step.unit(unit, model), ranks=ranks)) for step in plan.steps]
        self._passes = list(_passes(self._views))
        self._replays = any(step.replays(view) for step, view in self._views)

    @property
    def calibrates(self) -> bool:
        """True when some algorithm wants to measure something, or to run the unit itself."""
        return self._replays or any(map(_needs, self._passes))

    @property
    def edits(self) -> frozenset[str]:
        """Names of the parameters that algorithms change or add."""
        return frozenset(name for step, view in self._views for name in step.algorithm.edits(view))

    @property
    def passes_source(self) -> bool:
        """True when samples leave a unit that stays float as its source has it, whatever algorithms do to it then."""
        return self._replays or len(self._passes) == 1

    def collector(self) -> PortCollector:
        """Measures what the first pass needs."""
        return self._collector(self._passes[0])

    def calibrate(self, stream: Stream, resume: bool, reference: Stream | None = None) -> Outcome:
        """Measure on the samples that wait at the unit, work on it, and let them go on.

        Args:
            stream: the samples.
            resume: False to leave the samples at this unit, when nothing behind it is wanted.
            reference: the same samples, which pass float units only; for algorithms that replay, where
                ``stream`` passes quantized ones.
        """
        if reference is not None:
            reference.measure(self._unit, hold=True)
        layers = {
            name: module
            for name, module in self._model.get_submodule(self._unit).named_modules(prefix=self._unit)
            if isinstance(module, FusedExperts)
        }
        for layer in layers.values():
            layer.count_tokens()
        quantized = resume and self._plan.propagates_quantized
        replays = self._replays
        outcome = Outcome()
        expected: dict[str, Tensor] = {}
        borrowed: list[str] = []
        tokens = 0
        experts: dict[str, Any] = {}
        statistics = UnitStatistics({})
        for index, group in enumerate(self._passes):
            ports = self._collector(group)
            last = index + 1 == len(self._passes) and not quantized and not replays

            with ports, _showing(layers, group, self._plan.protocol.experts):
                if last:
                    tokens = stream.run(self._unit, ports, resume)
                else:
                    tokens = stream.measure(self._unit, ports, hold=replays and not quantized and index == 0)
            if index == 0:
                experts = {name: {"tokens": self._sum(layer.tokens_seen)} for name, layer in layers.items() if tokens}
            if tokens:
                borrowed = cover(ports, list(_needs(group)), self._plan.protocol.experts)
            statistics = ports.statistics()
            shares = Shares(self._views[0][1].linears, self._claimed, statistics, self._ranks)
            with ExitStack() as stack:
                for one in {stream, reference or stream} if replays else ():
                    stack.enter_context(one.awake())
                calls = self._calls(stream, reference or stream) if replays else ((), ())
                self._apply(group, statistics, outcome, calls, (shares.own(self._sampled(ports)), expected), shares)
                del calls
        qualities = self._judge(outcome.modules, statistics, expected)
        self._fall_back(qualities, statistics, expected, outcome)
        self._finish(outcome)
        if reference is not None and resume:
            reference.run(self._unit)
        if quantized or (replays and resume):
            standing = {**outcome.modules, **outcome.caches} if quantized else {}
            with in_place(self._model, standing):
                stream.run(self._unit, resume=resume)
        self.drop_multipliers()
        outcome.record |= {
            "tokens": tokens,
            "experts": experts,
            "borrowed": borrowed,
            "quality": {name: quality.as_data() for name, quality in qualities.items()},
        }
        return outcome

    def drop_multipliers(self) -> None:
        """Forget by what the inputs of float linears are multiplied."""
        for linear in self._views[0][1].linears.values():
            drop_input_multiplier(linear)

    def work(self, statistics: UnitStatistics) -> Outcome:
        """Run the algorithms with statistics that were collected elsewhere, or with none."""
        outcome = Outcome()
        for group in self._passes:
            self._apply(group, statistics, outcome)
        self._finish(outcome)
        outcome.record |= {"tokens": 0}
        return outcome

    def _apply(
        self,
        group: Sequence[View],
        statistics: UnitStatistics,
        outcome: Outcome,
        calls: Calls = ((), ()),
        judged: tuple[Mapping[str, nn.Module], dict[str, Tensor]] | None = None,
        shares: Shares | None = None,
    ) -> None:
        """Run the algorithms of a pass.

        Args:
            group: the algorithms with the unit.
            statistics: what the pass measured.
            outcome: takes what they answer.
            calls: for those that replay, and the outputs of the float model.
            judged: linears whose outputs are wanted, and where they go. They are taken when the linear is about
                to be quantized: smoothing may have divided them.
            shares: which linears this rank works on, where others work on the rest; None to work on all.
        """
        shares = shares or Shares(self._views[0][1].linears, self._claimed, statistics, self._ranks)
        linears, outputs = judged or ({}, {})
        outcome.observed.enter(statistics)
        for step, seen in group:
            outputs.update(float_outputs({name: linears[name] for name in seen.specs if name in linears}, statistics))
            handed = self._context.view(step.algorithm.hands_over, step.algorithm.takes_over)
            view = replace(seen, context=handed)
            if step.algorithm.replays:
                view = replace(view, calls=calls[0], targets=calls[1])
            # What is handed over must be whole at every rank.
            divided = step.algorithm.separable and not step.algorithm.hands_over
            own = replace(view, specs=shares.own(view.specs)) if divided else view
            modules = {name: _checked(name, one) for name, one in step.algorithm.apply(own, statistics).items()}
            outcome.modules.update(shares.all(modules, view.specs) if divided else modules)
            outcome.caches.update(step.algorithm.quantize_caches(view, statistics))
            outcome.edited |= step.algorithm.edits(view)
        outcome.observed.leave(statistics)

    def _calls(self, stream: Stream, reference: Stream) -> Calls:
        """The calls of the unit, and what the float model gives for them."""
        calls, held = stream.waiting(self._unit), reference.held()
        if calls.keys() != held.keys():
            raise ModelError(
                f"other samples enter {self._unit} when the units before it are quantized",
                hint="say propagation: float in spec",
            )
        unit = ProcessRequest(self._unit, self._model.get_submodule(self._unit))
        found = gathered_calls(unit, {number: (call, held[number]) for number, call in calls.items()}, self._ranks)
        return [call for call, _ in found], [output for _, output in found]

    def _judge(
        self, modules: Mapping[str, QuantizedLinear], statistics: UnitStatistics, expected: Mapping[str, Tensor]
    ) -> dict[str, Quality]:
        """The quality of linears, each judged by the rank that has its float output."""
        own = {name: quality.as_data() for name, quality in judge(modules, statistics, expected).items()}
        found = {name: Quality(**data) for part in self._ranks.gather(own) for name, data in part.items()}
        return {name: found[name] for name in modules if name in found}

    def _sum(self, tokens: Sequence[int]) -> list[int]:
        """Of all ranks."""
        return [sum(counts) for counts in zip(*self._ranks.gather(list(tokens)), strict=True)]

    def _finish(self, outcome: Outcome) -> None:
        """What is known once every linear has found its form."""
        waiting: dict[str, nn.Module] = {}
        for name, linear in self._views[0][1].linears.items():
            # Quality was judged on inputs that were multiplied already.
            if name in outcome.modules:
                outcome.modules[name].input_multiplier = input_multiplier(linear)
            elif self._plan.stage is not None and name not in self._claimed:  # a later stage may quantize it
                waiting[name] = linear
            else:
                undo_input_multiplier(linear)
        outcome.multipliers = shared_multipliers(waiting)
        held = {f"{name}.{part}" for name in outcome.modules for part in ("weight", "bias")}
        outcome.edited -= held
        outcome.specs = {name: module.spec for name, module in outcome.modules.items()}
        outcome.record["linears"] = {name: spec.scheme for name, spec in outcome.specs.items()}
        if activations := outcome.observed.as_data():
            outcome.record["activations"] = activations
        if notes := {name: list(one.notes) for name, one in outcome.modules.items() if one.notes}:
            outcome.record["notes"] = notes
        if outcome.caches:
            outcome.record["caches"] = {name: cache.spec.dtype for name, cache in outcome.caches.items()}

    def _fall_back(
        self,
        qualities: dict[str, Quality],
        statistics: UnitStatistics,
        expected: Mapping[str, Any],
        outcome: Outcome,
    ) -> None:
        """Give linears that came out badly another form, together with those that an engine fuses with them."""
        fallen: dict[str, Any] = {}
        for step, view in self._views:
            rule = step.algorithm.fallback
            if rule is None:
                continue
            bad = [name for name in view.specs if name in qualities and qualities[name].relative_error > rule.above]
            names = [name for name in view.specs if any(_belong(name, one, statistics) for one in bad)]
            for name in names:
                fallen[name] = {"from": view.specs[name].scheme, "to": "FLOAT"}
                if name in qualities:
                    fallen[name]["relative_error"] = qualities.pop(name).relative_error
                del outcome.modules[name]
            if rule.algorithm is not None and rule.spec is not None and names:
                spec = with_held_scales(rule.spec, self._plan.saver, self._plan.info.dtype)
                again = replace(view, specs=dict.fromkeys(names, spec))
                made = {name: _checked(name, one) for name, one in rule.algorithm.apply(again, statistics).items()}
                outcome.modules.update(made)
                qualities.update(self._judge(made, statistics, expected))
                for name in made:
                    fallen[name]["to"] = spec.scheme
        if fallen:
            outcome.record["fell_back"] = fallen

    def _sampled(self, ports: PortCollector) -> dict[str, nn.Module]:
        linears = self._views[0][1].linears
        return {name: linears[name] for name in self._claimed if name in ports.wanted}

    def _collector(self, group: Sequence[View]) -> PortCollector:
        """Measures what a pass needs, and samples what is to be judged where anything is measured at all."""
        needs = dict(_needs(group))
        if self.calibrates:
            for name in self._claimed:
                needs[name] = needs.get(name, frozenset()) | {RowSample}
        view = group[0][1]
        return PortCollector({**view.modules, **view.linears}, needs)


def count_passes(plan: Plan, unit: str) -> int:
    """How often each sample passes the unit: to be measured, to be handed on quantized, and beside that float."""
    passes = len(list(_passes([(step, step.unit(unit, plan.model)) for step in plan.steps])))
    return passes + (1 + plan.replays if plan.propagates_quantized else 0)


def _passes(views: Sequence[View]) -> Iterator[list[View]]:
    """The steps that can share a pass, in order: a statistic that cannot follow a rescaling wants a new one."""
    group: list[View] = []
    moved = shifted = False
    for step, view in views:
        kinds = {kind for wanted in step.algorithm.needs(view).values() for kind in wanted}
        # What is divided may be the values that enter a cache, whose statistics nobody rescales.
        follows = not view.caches and all(follows_rescaling(kind, shifts=shifted) for kind in kinds)
        if moved and not follows:
            yield group
            group, moved, shifted = [], False, False
        group.append((step, view))
        moved = moved or step.algorithm.rescales
        shifted = shifted or step.algorithm.shifts
    yield group


def _needs(group: Sequence[View]) -> dict[str, Kinds]:
    needs: dict[str, Kinds] = {}
    rescales = any(step.algorithm.rescales for step, _ in group)
    for step, view in group:
        for name, kinds in step.algorithm.needs(view).items():
            # The range of the whole follows a rescaling only when those of the channels are known.
            wanted = frozenset(ChannelRange if rescales and kind is TensorRange else kind for kind in kinds)
            needs[name] = needs.get(name, frozenset()) | wanted
    return needs


def _checked(name: str, module: nn.Module) -> QuantizedLinear:
    if not isinstance(module, QuantizedLinear):
        raise QuantizationError(f"{name}: an algorithm put {type(module).__name__} in its place")
    return module


def _belong(name: str, other: str, statistics: UnitStatistics) -> bool:
    """True for linears that engines fuse: those of one input, and all experts of a layer."""
    if name == other or statistics.shares_port(name, other):
        return True
    parent, same = name.rpartition(".")[0], other.rpartition(".")[0]
    return parent == same and parent.endswith("experts")


@contextmanager
def _showing(layers: Mapping[str, FusedExperts], group: Sequence[View], policy: str) -> Iterator[None]:
    """Show all tokens to every expert of the layers that are measured, when the protocol says so."""
    needs = _needs(group)
    for name, layer in layers.items():
        layer.show_all = policy == "all" and any(one.startswith(f"{name}.") for one in needs)
    yield
    for layer in layers.values():
        layer.show_all = False
