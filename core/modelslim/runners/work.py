# SPDX-License-Identifier: Apache-2.0
"""The work on one unit: measure, run the algorithms, judge what they made, hand on the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from modelslim.activations import Boundary
from modelslim.algorithm import Unit
from modelslim.coverage import cover
from modelslim.errors import QuantizationError
from modelslim.experts import FusedExperts
from modelslim.plan import Plan
from modelslim.plan_checks import Step, with_held_scales
from modelslim.ports import Kinds, PortCollector
from modelslim.quality import Quality, float_outputs, judge
from modelslim.quantized import QuantizedLinear
from modelslim.statistics import ChannelRange, RowSample, TensorRange, UnitStatistics, follows_rescaling
from modelslim.types import ProcessRequest, QuantSpec

View = tuple[Step, Unit]


@dataclass
class Outcome:
    """What became of a unit.

    Attributes:
        modules: what replaces linears, by name, on the device.
        edited: names of parameters that were changed in place or added and stay float.
        specs: what the quantized linears became, by the names of the modules that hold them.
        record: for the report.
    """

    modules: dict[str, QuantizedLinear] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


class UnitWork:
    """One unit of a run, or the linears outside all units.

    Args:
        plan: the plan.
        model: the model in which the unit is, or will be, loaded.
        unit: its name; empty for what lies outside the units.
    """

    def __init__(self, plan: Plan, model: nn.Module, unit: str) -> None:
        self._plan = plan
        self._model = model
        self._unit = unit
        self._claimed = plan.claimed(unit)
        self._views: list[View] = [(step, step.unit(unit, model)) for step in plan.steps]
        self._passes = list(_passes(self._views))

    @property
    def calibrates(self) -> bool:
        """True when some algorithm wants to measure something."""
        return any(map(_needs, self._passes))

    def collector(self) -> PortCollector:
        """Measures what the first pass needs."""
        return self._collector(self._passes[0])

    def calibrate(self, boundary: Boundary, after_sample: Callable[[], None], resume: bool) -> Outcome:
        """Measure on the samples that wait at the unit, work on it, and let them go on.

        Args:
            boundary: the samples.
            after_sample: called when a sample has passed the unit.
            resume: False to leave the samples at this unit, when nothing behind it is wanted.
        """
        layers = {
            name: module
            for name, module in self._model.get_submodule(self._unit).named_modules(prefix=self._unit)
            if isinstance(module, FusedExperts)
        }
        for layer in layers.values():
            layer.count_tokens()
        quantized = resume and self._plan.propagates_quantized
        replays = any(step.algorithm.replays for step, _ in self._views)
        outcome = Outcome()
        expected: dict[str, Tensor] = {}
        borrowed: list[str] = []
        tokens = 0
        experts: dict[str, Any] = {}
        statistics = UnitStatistics({})
        for index, group in enumerate(self._passes):
            ports = self._collector(group)
            last = index + 1 == len(self._passes) and not quantized and not replays

            def passed(ports: PortCollector = ports) -> None:
                ports.next_sample()
                after_sample()

            with ports, _showing(layers, group, self._plan.protocol.experts):
                if last:
                    tokens = boundary.run_unit(self._unit, passed, resume)
                else:
                    tokens = boundary.measure_unit(self._unit, passed)
            if index == 0:
                experts = {name: {"tokens": layer.tokens_seen} for name, layer in layers.items() if tokens}
            if tokens:
                borrowed = cover(ports, list(_needs(group)), self._plan.protocol.experts)
            statistics = ports.statistics()
            calls = boundary.waiting(self._unit) if replays else ()
            self._apply(group, statistics, outcome, calls, (self._sampled(ports), expected))
        qualities = judge(outcome.modules, statistics, expected)
        self._fall_back(qualities, statistics, expected, outcome)
        self._finish(outcome)
        if quantized or (replays and resume):
            with _in_place(self._model, outcome.modules if quantized else {}):
                boundary.run_unit(self._unit, after_sample, resume)
        outcome.record |= {
            "tokens": tokens,
            "experts": experts,
            "borrowed": borrowed,
            "quality": {name: quality.as_data() for name, quality in qualities.items()},
        }
        return outcome

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
        calls: Sequence[ProcessRequest] = (),
        judged: tuple[Mapping[str, nn.Module], dict[str, Tensor]] | None = None,
    ) -> None:
        """Run the algorithms of a pass.

        Args:
            group: the algorithms with the unit.
            statistics: what the pass measured.
            outcome: takes what they answer.
            calls: for those that replay.
            judged: linears whose outputs are wanted, and where they go. They are taken when the linear is about
                to be quantized: smoothing may have divided them.
        """
        linears, outputs = judged or ({}, {})
        for step, seen in group:
            outputs.update(float_outputs({name: linears[name] for name in seen.specs if name in linears}, statistics))
            view = replace(seen, calls=calls) if step.algorithm.replays else seen
            for name, module in step.algorithm.apply(view, statistics).items():
                outcome.modules[name] = _checked(name, module)
            outcome.edited |= step.algorithm.edits(view)

    def _finish(self, outcome: Outcome) -> None:
        """What is known once every linear has found its form."""
        held = {f"{name}.{part}" for name in outcome.modules for part in ("weight", "bias")}
        outcome.edited -= held
        outcome.specs = {name: module.spec for name, module in outcome.modules.items()}
        outcome.record["linears"] = {name: spec.scheme for name, spec in outcome.specs.items()}

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
                qualities.update(judge(made, statistics, expected))
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
    """How often each sample passes the unit: to be measured, and once more to be handed on quantized."""
    passes = len(list(_passes([(step, step.unit(unit, plan.model)) for step in plan.steps])))
    return passes + int(plan.propagates_quantized or any(step.algorithm.replays for step in plan.steps))


def _passes(views: Sequence[View]) -> Iterator[list[View]]:
    """The steps that can share a pass, in order: a statistic that cannot follow a rescaling wants a new one."""
    group: list[View] = []
    moved = False
    for step, view in views:
        kinds = {kind for wanted in step.algorithm.needs(view).values() for kind in wanted}
        if moved and not all(map(follows_rescaling, kinds)):
            yield group
            group, moved = [], False
        group.append((step, view))
        moved = moved or step.algorithm.rescales
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


@contextmanager
def _in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let quantized linears stand in the model for a while."""
    originals = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
