# SPDX-License-Identifier: Apache-2.0
"""The plan's checks of the protocol against a model: every mistake becomes a diagnostic with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from modelslim.algorithm import Algorithm, Entry, Processor, Unit
from modelslim.errors import Diagnostic, nearest
from modelslim.model_info import ModelInfo
from modelslim.patterns import matches, matches_name
from modelslim.protocol.document import Document, format_path
from modelslim.protocol.model import Protocol
from modelslim.registry import Registry
from modelslim.saver import PlannedModel, Saver
from modelslim.session import Session
from modelslim.types import Problem, QuantSpec, Subgraph, TensorSpec, WeightSource

if TYPE_CHECKING:
    from torch import nn

Place = tuple[str | int, ...]
Check = Callable[[PlannedModel], Sequence[Problem]]


@dataclass(frozen=True)
class Step:
    """An algorithm with its place in the protocol and the linears that it quantizes.

    Attributes:
        algorithm: the algorithm.
        path: its entry in the protocol.
        specs: what it makes of which linears; empty for an algorithm that quantizes nothing itself.
        info: the model's structure.
        subgraphs: what smoothing may rescale, by unit; empty unless some algorithm wants to know.
        caches: what it makes of which key/value caches.
        done: names of the modules that earlier stages quantize.
    """

    algorithm: Algorithm
    path: Place
    specs: Mapping[str, QuantSpec]
    info: ModelInfo
    subgraphs: Mapping[str, Sequence[Subgraph]] = field(default_factory=dict)
    caches: Mapping[str, TensorSpec] = field(default_factory=dict)
    done: frozenset[str] = frozenset()

    def unit(self, name: str, model: nn.Module) -> Unit:
        """The unit as this algorithm sees it.

        Args:
            name: the unit; empty for what lies outside all units.
            model: the model, on meta or with the unit loaded.
        """
        held = [holder for holder in self.info.holders[name] if holder not in self.done]
        linears = {holder: model.get_submodule(holder) for holder in held}
        specs = {linear: self._by_module[linear] for linear in linears if linear in self._by_module}
        module = model.get_submodule(name) if name else None
        modules = dict(module.named_modules(prefix=name)) if module is not None else {}
        caches = {one: spec for one, spec in self.caches.items() if one.startswith(f"{name}.")} if name else {}
        return Unit(name, linears, specs, modules, self.subgraphs.get(name, ()), module, caches=caches)

    def replays(self, unit: Unit) -> bool:
        """True when the algorithm runs this unit on its calibration inputs."""
        return self.algorithm.replays and unit.module is not None and bool(unit.specs)

    def calibrates(self, unit: Unit) -> bool:
        """True when the algorithm wants to know what flows through this unit."""
        return bool(self.algorithm.needs(unit)) or self.replays(unit)

    @cached_property
    def _by_module(self) -> Mapping[str, QuantSpec]:
        return {self.info.linears[linear].module: spec for linear, spec in self.specs.items()}


class Checks:
    """Collects what is wrong with a protocol for a model.

    Args:
        document: the protocol with its positions.
        info: the model's structure.
        diagnostics: what is known to be wrong already; more is appended.
    """

    def __init__(self, document: Document, info: ModelInfo, diagnostics: list[Diagnostic]) -> None:
        self._document = document
        self._info = info
        self.diagnostics = diagnostics
        self.warnings: list[str] = []

    def refuse(self, path: Place, message: str, hint: str = "") -> None:
        """Note a mistake at a place of the protocol."""
        self.diagnostics.append(self._document.diagnostic(message, path, hint=hint))

    def steps(self, entries: Iterable[Entry], registry: Registry) -> list[Step]:
        """The algorithms of ``process``, groups unfolded, with what each claims."""
        linears = list(self._info.linears.values())
        claimed: dict[str, Place] = {}
        steps = []
        for path, config in self._unfold(entries, registry):
            algorithm = registry.load("algorithms", config["type"]).from_config(config)
            if not algorithm.takes_caches:
                self._check_patterns(algorithm, path)
            specs = algorithm.select(linears)
            self._check_claims(specs, path, claimed)
            self._check_banks(specs, path, algorithm, config["type"])
            for problem in algorithm.check(linears):
                self._add(problem, path, {})
            steps.append(Step(algorithm, path, specs, self._info))
        return steps

    def unsupported(self, protocol: Protocol) -> None:
        """Refuse what the schema admits and this version does not do."""
        for other in protocol.save[1:]:
            self.refuse(other.path, "a run writes one format", "keep one entry of save, and run again for the other")

    def hooks(self, steps: Sequence[Step], session: Session, calibrate: bool) -> None:
        """Refuse algorithms that need hooks which the adapter does not implement."""
        for step in steps:
            missing = session.missing(step.algorithm.requires)
            if missing:
                self.refuse(
                    step.path,
                    f"needs {', '.join(missing)}, which the model's adapter does not implement",
                    "leave this entry out, or use an adapter that offers it",
                )
        missing = session.missing({"generate_model_forward", "handle_dataset"}) if calibrate else []
        if missing:
            self.refuse(
                ("spec", "process"),
                f"needs calibration, and the model's adapter does not implement {', '.join(missing)}",
                "quantize activations per_token, which needs no calibration",
            )

    def saver(self, check: Check, model: PlannedModel, path: Place, steps: Sequence[Step]) -> None:
        """Refuse what the saver cannot write, or the engine not load."""
        origin = {linear: step.path for step in steps for linear in step.specs}
        if not origin and not model.caches and not self.diagnostics:
            self.refuse(
                ("spec", "process"), "selects no linear: nothing would be quantized", "check include and exclude"
            )
        for problem in check(model):
            self._add(problem, path, origin)

    def fallbacks(self, check: Check, saver: Saver, model: PlannedModel, steps: Sequence[Step]) -> None:
        """Refuse a fallback that the saver cannot write, or the engine not load."""
        rules = [(step, step.algorithm.fallback.spec) for step in steps if step.algorithm.fallback is not None]
        wanted = [(step, spec) for step, spec in rules if spec is not None]
        # Asked only for those that want it: a saver looks at every linear, of which there may be tens of thousands.
        known = {problem.message for problem in check(model)} if wanted else set()
        for step, spec in wanted:
            held = with_held_scales(spec, saver, model.dtype)
            fallen = replace(model, specs={**model.specs, **dict.fromkeys(step.specs, held)})
            for problem in check(fallen):
                if problem.fatal and problem.message not in known:
                    self.refuse((*step.path, "fallback", "to"), problem.message, problem.hint)

    def multipliers(self, saver: Saver, multiplied: Mapping[str, Step]) -> None:
        """Refuse multiplications at run time for which the format has no place."""
        if multiplied and not saver.stores_multipliers:
            name, step = next(iter(multiplied.items()))
            more = f" and {len(multiplied) - 1} others" if len(multiplied) > 1 else ""
            self.refuse(
                step.path,
                f"multiplies the input of {name}{more} at run time, which the format has no place for",
                "take non-fusion out of enable_subgraph_type, or write another format",
            )

    def contexts(self, stages: Sequence[Sequence[Step]]) -> None:
        """Refuse algorithms that read what no earlier stage hands over, or write what no later one can read."""
        known: set[str] = set()
        for number, steps in enumerate(stages, start=1):
            for step in steps:
                for name in sorted(step.algorithm.takes_over - known):
                    self.refuse(
                        step.path,
                        f"needs {name!r} of the context, which no earlier stage hands over",
                        "put the entry that makes it into a stage of spec.prior",
                    )
                for name in sorted(step.algorithm.hands_over if number == len(stages) else ()):
                    self.refuse(
                        step.path,
                        f"hands over {name!r} to later stages, and there is none behind the main one",
                        "put this entry into a stage of spec.prior",
                    )
            known.update(name for step in steps for name in step.algorithm.hands_over)

    def edits(self, steps: Sequence[Step], model: nn.Module, sources: Mapping[str, WeightSource]) -> None:
        """Refuse to change weights that cannot be written back in the form in which they are stored."""
        tied = _tied(model)
        for index, step in enumerate(steps):
            if not step.algorithm.rescales:
                continue
            names = {name for unit in self._info.units for name in step.algorithm.edits(step.unit(unit, model))}
            quantized = {self._info.linears[one].module for other in steps for one in other.specs}
            done = {self._info.linears[one].module: other.path for other in steps[:index] for one in other.specs}
            for name in sorted(names):
                owner = name.rpartition(".")[0]
                if owner in done:
                    self.refuse(
                        step.path,
                        f"changes {name}, which {format_path(done[owner])} has quantized by then",
                        "put it in front of what quantizes",
                    )
                    break
                twin = next((one for one in tied.get(name, ()) if one != name), None)
                if twin is not None:
                    self.refuse(
                        step.path,
                        f"changes {name}, which is {twin} as well: what reads the other would change with it",
                        "exclude it here; the adapter should leave it out of the topology",
                    )
                    break
                source = sources.get(name)
                whole = source is None or source.convert is None or owner in self._info.banks
                if not whole and owner not in quantized:
                    self.refuse(
                        step.path,
                        f"changes {name}, which is put together from {source.keys[0] if source else ''} and others and "
                        "stays float, so that it cannot be written back",
                        "quantize it, or exclude it here",
                    )
                    break

    def shared(self, steps: Sequence[Step], sources: Mapping[str, WeightSource]) -> None:
        """Refuse to quantize a part of a stored tensor whose other parts would then be lost."""
        parts: dict[str, list[str]] = {}
        for parameter, source in sources.items():
            # An adapter may also name what the model does not have.
            for key in source.keys if parameter.rpartition(".")[0] in self._info.modules else ():
                parts.setdefault(key, []).append(parameter)
        quantized = {
            f"{self._info.linears[linear].module}.{parameter}": step.path
            for step in steps
            for linear in step.specs
            for parameter in ("weight", "bias")
        }
        for key, parameters in parts.items():
            chosen = [parameter for parameter in parameters if parameter in quantized]
            left = [parameter for parameter in parameters if parameter not in quantized]
            if chosen and left:
                self.refuse(
                    quantized[chosen[0]],
                    f"quantizes {chosen[0]} and not {left[0]}, which are parts of the stored tensor {key}",
                    "include or exclude all parts of a stored tensor together",
                )
                return

    def _unfold(self, entries: Iterable[Entry], registry: Registry) -> Iterable[Entry]:
        for path, config in entries:
            processor: type[Processor] = registry.load("algorithms", config["type"])
            for inner, member in processor.expand(config):
                if inner:
                    yield from self._unfold([((*path, *inner), member)], registry)
                else:
                    yield path, member

    def _check_patterns(self, algorithm: Algorithm, path: Place) -> None:
        linears = self._info.linears.values()
        for place, pattern in algorithm.patterns():
            if any(matches(linear, pattern) for linear in linears):
                continue
            if place[0] == "exclude" and any(matches_name(name, pattern) for name in self._info.modules):
                continue  # it keeps something float that is no linear anyway, such as a router
            hint = _nearest_pattern(pattern, self._info)
            if any(matches_name(name, pattern) for name in self._info.modules):
                reasons = {kept.why for name, kept in self._info.kept.items() if matches_name(name, f"{pattern}*")}
                hint = "it matches modules, but no linear that can be quantized"
                if "stacked experts" in reasons:
                    hint = "it matches experts that are stacked in a way unknown to the adapter; they stay float"
                elif "router" in reasons:
                    hint = "it matches routers, which stay float: engines have no quantized ones"
            if not any(linear.unit for linear in linears):
                hint = "the layers of this model hold no linear that can be quantized, only modules of other classes"
            elif any(matches_name(linear.name, pattern) for linear in linears):
                hint = "it matches linears outside the layers, which must be named outright, as in 'lm_head'"
            self.refuse((*path, *place), f"the pattern {pattern!r} matches no linear of the model", hint)

    def _check_claims(self, specs: Mapping[str, QuantSpec], path: Place, claimed: dict[str, Place]) -> None:
        twice: dict[Place, list[str]] = {}
        for linear in specs:
            if linear in claimed:
                twice.setdefault(claimed[linear], []).append(linear)
            claimed[linear] = path
        for other, names in twice.items():
            more = f" and {len(names) - 1} other linears" if len(names) > 1 else ""
            self.refuse(
                path,
                f"quantizes {names[0]}{more}, which {format_path(other)} quantizes already",
                "exclude them from one of the two",
            )

    def _check_banks(self, specs: Mapping[str, QuantSpec], path: Place, algorithm: Algorithm, type_: str) -> None:
        """Experts that are one weight can only be quantized alike, which is what engines want as well."""
        fused = next((name for name in specs if self._info.linears[name].bank), None)
        if fused is not None and not algorithm.takes_experts:
            self.refuse(
                path,
                f"{type_} does not quantize fused experts, and it selects {fused}",
                'exclude "*experts*" here, and give them to an algorithm that does, such as linear_quant',
            )
            return
        mixed: list[tuple[list[str], list[str]]] = []
        for bank in self._info.banks.values():
            names = [linear.name for linears in bank.linears for linear in linears]
            spec = specs.get(names[0])
            if spec is not None and not bank.is_whole(spec.weight.group_rows):
                self.refuse(
                    (*path, "qconfig", "weight"),
                    f"blocks of {spec.weight.group_rows} rows would cross from one linear to another in the weight "
                    f"that holds {names[0]} and {names[1] if len(names) > 1 else 'others'}",
                    "use scope per_channel for experts",
                )
                return
            chosen = [name for name in names if name in specs]
            if chosen and len({specs.get(name) for name in names}) > 1:
                mixed.append((chosen, [name for name in names if name not in specs]))
        if mixed:
            chosen, left = mixed[0]
            more = f"; {len(mixed) - 1} other weights likewise" if len(mixed) > 1 else ""
            self.refuse(
                path,
                f"quantizes {chosen[0]} and not {left[0]}, which are one weight of fused experts{more}"
                if left
                else f"gives the experts of {self._info.linears[chosen[0]].bank} several schemes{more}",
                "include or exclude all experts of a layer together, gate_proj with up_proj, as '*experts*' does",
            )

    def _add(self, problem: Problem, path: Place, origin: Mapping[str, Place]) -> None:
        place = (*path, *problem.path)
        if problem.linear is not None:
            place = (*origin[problem.linear], "qconfig")
        if problem.fatal:
            self.refuse(place, problem.message, problem.hint)
        else:
            self.warnings.append(str(self._document.diagnostic(problem.message, place, hint=problem.hint)))


def with_scale_dtypes(steps: Sequence[Step], saver: Saver, model_dtype: str) -> list[Step]:
    """The steps with the scale types in which the saver's engine will hold the scales."""

    refined: dict[QuantSpec, QuantSpec] = {}

    def refine(spec: QuantSpec) -> QuantSpec:
        return refined.setdefault(spec, with_held_scales(spec, saver, model_dtype))

    return [replace(step, specs={name: refine(spec) for name, spec in step.specs.items()}) for step in steps]


def with_held_scales(spec: QuantSpec, saver: Saver, model_dtype: str) -> QuantSpec:
    """The spec with the scale types in which the saver's engine will hold the scales."""
    weight, activation = saver.scale_dtypes(spec, model_dtype)
    return QuantSpec(replace(spec.weight, scale_dtype=weight), replace(spec.activation, scale_dtype=activation))


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has several, by each of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _nearest_pattern(pattern: str, info: ModelInfo) -> str:
    """What a pattern may have meant: a part of names, a pattern, or the nearest to its literal part."""
    # Of a regular expression the same as a pattern; of a name without wildcards what ends in it.
    glob = re.sub(r"\.[*+]", "*", pattern).strip("^$").replace("\\.", ".")
    for other in dict.fromkeys([glob, f"*{glob}"]):
        if other != pattern and any(matches(linear, other) for linear in info.linears.values() if linear.unit):
            why = " Patterns are no regular expressions, and * stands for anything" if glob != pattern else ""
            return f"did you mean '{other}'?{why}"
    literal = max(re.split(r"[*?{},.\[\]]+", pattern), key=len)
    parts = {part for name in info.linears for part in name.split(".") if not part.isdigit()}
    return nearest(literal, parts) if literal else ""
