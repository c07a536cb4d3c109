# SPDX-License-Identifier: Apache-2.0
"""Resolves and checks all that can fail before a weight is read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.dataset import find_dataset, read_samples
from modelslim.devices import resolve_device
from modelslim.edits import stored_name
from modelslim.engine_rules import Target, check_model, choose_target
from modelslim.errors import DatasetError, Diagnostic, ModelSlimError, ProtocolError
from modelslim.guard import prove_forward
from modelslim.inputs import holds_media
from modelslim.kv_cache import attentions, open_places
from modelslim.loader import Loader
from modelslim.memory import Budget, parse_budget
from modelslim.model_info import ModelInfo, describe, other_matrices
from modelslim.plan_caches import cache_specs, check_stored, with_caches, with_held_cache_scales
from modelslim.plan_checks import Checks, Step, with_scale_dtypes
from modelslim.plan_topology import (
    as_used,
    find_added_biases,
    find_multiplied,
    find_rescaled,
    find_topology,
    with_subgraphs,
)
from modelslim.protocol.document import Document
from modelslim.protocol.model import Protocol
from modelslim.protocol.validate import check_document, read_protocol
from modelslim.registry import Registry
from modelslim.runners.choice import choose_runner
from modelslim.sampling import choose_samples
from modelslim.saver import PlannedModel, Saver
from modelslim.session import Session
from modelslim.start import started
from modelslim.token_lengths import token_lengths
from modelslim.types import Problem, QuantSpec, Topology
from modelslim.vlm_dataset import read_vlm_samples

if TYPE_CHECKING:
    from modelslim.plan_costs import Costs
    from modelslim.practice_choice import Choice


@dataclass(frozen=True)
class Plan:
    """All that a run needs, checked; or all that one of its prior stages needs.

    Attributes:
        protocol: what the YAML says.
        checkpoint: the source, open.
        session: the adapter and the other plugins of this run.
        adapter: name of the adapter's entry point.
        model: the model on meta.
        info: its structure.
        loader: fills ``model`` on ``device``; knows the source of every parameter.
        steps: the algorithms of this stage, in the order of the protocol, groups unfolded.
        saver: the saver.
        planned: what the saver was told, of all stages.
        samples: calibration samples of this stage; empty when none of its algorithms needs any.
        dataset: the file or directory that they come from.
        calib_length: tokens after which a text is cut; None for never.
        device: torch device of the computation.
        runner: name of the runner.
        runner_why: why that one, in a few words.
        registry: the installed plugins.
        topology: what smoothing may rescale; None when no algorithm asks.
        rescaled: full names of the parameters that smoothing changes.
        added: full names of the biases that smoothing adds to modules without one.
        target: the engine that the result is checked for; None when no contract of it is known.
        practice: how the protocol was chosen; None when the user named it.
        warnings: what the user should know and what does not stop the run.
        lengths: tokens of each input that passes the model at once: a sample, or several of equal length.
        ranks: how many processes share the run.
        budget: what the run may hold in memory.
        stage: number of the prior stage, from 0; None for the main one.
        prior: the stages before the main one, in order; empty for a prior stage.
        seconds: what it took to make the plan.
    """

    protocol: Protocol
    checkpoint: Checkpoint
    session: Session
    adapter: str
    model: nn.Module
    info: ModelInfo
    loader: Loader
    steps: Sequence[Step]
    saver: Saver
    planned: PlannedModel
    samples: Sequence[Any]
    dataset: Path | None
    calib_length: int | None
    device: str
    runner: str
    runner_why: str
    registry: Registry
    topology: Topology | None
    rescaled: frozenset[str]
    added: frozenset[str]
    target: Target | None
    practice: Choice | None
    warnings: Sequence[str]
    lengths: Sequence[int]
    ranks: int
    budget: Budget
    stage: int | None = None
    prior: Sequence[Plan] = ()
    seconds: float = 0.0

    @property
    def stages(self) -> Sequence[Plan]:
        """All stages in the order in which they run, the main one last."""
        return (*self.prior, self)

    @cached_property
    def costs(self) -> Costs:
        """What the stage is expected to hold and to take, and how it keeps to the budget.

        Raises:
            UsageError: the budget is too small.
        """
        from modelslim.plan_costs import find_costs  # which needs plans itself

        return find_costs(self)

    @property
    def specs(self) -> Mapping[str, QuantSpec]:
        """What the quantized linears become, by name; those of all stages."""
        return self.planned.specs

    @property
    def propagates_quantized(self) -> bool:
        """True when a unit's quantized outputs, not its float ones, calibrate the next."""
        asked = self.protocol.propagation
        return asked == "quantized" or (asked == "auto" and any(step.algorithm.compensates for step in self.steps))

    @property
    def replays(self) -> bool:
        """True when an algorithm runs units itself and wants to know what the float model gives."""
        return any(step.algorithm.replays for step in self.steps)

    def claimed(self, unit: str) -> dict[str, QuantSpec]:
        """What the modules of a unit become whose linears are quantized by this stage, by name."""
        return {one.module: self._own[one.name] for one in self.info.by_unit[unit] if one.name in self._own}

    @property
    def works_outside(self) -> bool:
        """True when something outside the units is quantized here, or was before and is to be written."""
        known = self._own if self.stage is not None else self.specs
        return any(one.name in known for one in self.info.by_unit[""])

    @cached_property
    def _own(self) -> Mapping[str, QuantSpec]:
        """What this stage makes of which linears."""
        return {linear: spec for step in self.steps for linear, spec in step.specs.items()}

    def stored_keys(self, parameter: str) -> tuple[str, ...]:
        """Names of the stored tensors that make a parameter; none for one that was added."""
        source = self.loader.sources.get(parameter)
        return source.keys if source else ()

    def result_sizes(self) -> dict[str, int]:
        """Name and bytes of every tensor of the result."""
        sizes = {name: stored.nbytes for name, stored in self.checkpoint.tensors.items() if name not in self.replaced}
        for parameter in sorted(self.added):
            weight = self.model.get_parameter(f"{parameter.removesuffix('.bias')}.weight")
            sizes[stored_name(parameter, self.loader.sources)] = weight.shape[0] * weight.element_size()
        for name, spec in self.specs.items():
            sizes.update(self.saver.encoded_sizes(self.planned.linears[name], spec, self.info.dtype))
        for name, cache in self.planned.caches.items():
            sizes.update(self.saver.cache_sizes(cache, self.planned.cache_specs[name], self.info.dtype))
        return sizes

    def kept_bytes(self) -> int:
        """How much prior stages write beside the result, at most, until the run is done."""
        meta, sizes = self.loader.parameters, 0
        for stage in self.prior:
            names = find_rescaled(stage.steps, self.info, self.model)
            sizes += sum(meta[name].numel() * meta[name].element_size() for name in names if name in meta)
            for unit in (*self.info.units, ""):  # codes take a byte each, their scales less
                sizes += sum(2 * self.model.get_parameter(f"{name}.weight").numel() for name in stage.claimed(unit))
        return sizes

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Stored tensors that no parameter of the model takes; they are copied."""
        taken = {key for source in self.loader.sources.values() for key in source.keys}
        return frozenset(self.checkpoint.tensors.keys() - taken)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Stored tensors that quantized ones replace."""
        keys: set[str] = set()
        for module in {self.info.linears[name].module for name in self.specs}:
            for part in ("weight", "bias"):
                keys.update(self.stored_keys(f"{module}.{part}"))
        return frozenset(keys)


def make_plan(
    model_path: Path,
    config_path: Path,
    *,
    device: str | None = None,
    model_type: str | None = None,
    trust_remote_code: bool = False,
    engine: str | None = None,
    tp: int = 1,
    calib_samples: int | None = None,
    calib_length: int | None = None,
    practice: Choice | None = None,
    ranks: int = 1,
    max_memory: str | None = None,
    observers: Sequence[tuple[str, object]] = (),
    document: Document | None = None,
) -> Plan:
    """Resolve a run and refuse what cannot work, all mistakes of the protocol at once.

    Args:
        model_path: directory of the float model.
        config_path: the YAML protocol.
        device: ``cpu``, ``cuda:0``, ...; None for the best that is there.
        model_type: published model name or model_type; None to go by config.json.
        trust_remote_code: allow code of the checkpoint to run.
        engine: refuse what this engine does not load, such as ``vllm-ascend`` or ``vllm-0.32``; None to be warned
            of what the engine that the format is for does not load.
        tp: the engine's degree of tensor parallelism.
        calib_samples: calibrate on at most so many samples; None for as many as the algorithms want.
        calib_length: tokens after which a calibration text is cut; None for never.
        practice: how the protocol was chosen, for the report; None when the user named it.
        ranks: how many processes share the run, each with a device of its own.
        max_memory: what the run may hold beyond what the process holds by then, as in ``24GiB,cuda:0=60GiB``; None
            for no limit but what is free on an accelerator.
        observers: further plugins of this run, by name.
        document: the protocol, when it is part of another file, which ``config_path`` then is; None to read it.

    Raises:
        ProtocolError, PluginError, CapabilityError, ModelError, DatasetError, UsageError: before
            any weight is read.
    """
    start = time.perf_counter()
    registry = Registry.scan()
    if document is None:
        protocol, diagnostics = read_protocol(config_path, registry)
    else:
        protocol, diagnostics = check_document(document, registry)
    if protocol is None:
        raise _refusal(config_path, diagnostics)
    with _together_with(diagnostics):
        budget = parse_budget(max_memory)
        resolved = resolve_device(device)
        checkpoint = Checkpoint(model_path)
        kind, name, remark = choose_adapter(checkpoint.config, model_type, registry)
        session = open_session(
            kind, name, checkpoint.config["model_type"], model_path, trust_remote_code, registry, observers
        )
        checkpoint.decode(session.get_decoded_tensors(checkpoint.stored))
        model = session.init_model("meta")
        loader = Loader(model, checkpoint, session.get_weight_sources(model, checkpoint.shapes), resolved)
        loader.require_fit()
        info = describe(model, list(session.generate_model_visit(model)), loader)
    checks = Checks(protocol.document, info, diagnostics)
    steps = checks.steps(((entry.path, entry.config) for entry in protocol.entries), registry)
    checks.unsupported(protocol)
    if not protocol.save:  # the only entry has a mistake, which is among the diagnostics
        raise _refusal(config_path, diagnostics)
    saver: Saver = registry.load("savers", protocol.save[0].type).from_config(protocol.save[0].config)
    steps = with_scale_dtypes(steps, saver, info.dtype)
    specs = {linear: spec for step in steps for linear, spec in step.specs.items()}
    topology = find_topology(steps, session, model)
    if topology is not None:
        steps = with_subgraphs(steps, topology)
    with _together_with(diagnostics):
        steps, caches = with_caches(steps, session, model, info, checks)
        steps = with_held_cache_scales(steps, saver, info.dtype)
        open_places(model, attentions(caches))
    multiplied = find_multiplied(steps, info, model)
    if topology is not None:
        topology = as_used(topology, multiplied)
    rescaled = find_rescaled(steps, info, model)
    added = find_added_biases(rescaled, model)
    linears = {
        linear: replace(
            one,
            has_bias=one.has_bias or f"{one.module}.bias" in added,
            has_multiplier=one.module in multiplied,
        )
        for linear, one in info.linears.items()
    }
    planned = PlannedModel(
        checkpoint.config,
        info.dtype,
        linears,
        specs,
        frozenset(checkpoint.tensors),
        frozenset(linear for linear, one in linears.items() if one.has_bias and not info.linears[linear].has_bias),
        other_matrices(model, info, loader, checkpoint.shapes),
        caches,
        cache_specs(steps),
    )
    with _together_with(diagnostics):
        target = choose_target(engine, tp, saver, registry)

    def problems(result: PlannedModel) -> Sequence[Problem]:
        return check_model(saver, protocol.save[0].type, target, result)

    checks.saver(problems, planned, protocol.save[0].path, steps)
    checks.fallbacks(problems, saver, planned, steps)
    checks.shared(steps, loader.sources)
    checks.edits(steps, model, loader.sources)
    checks.multipliers(saver, multiplied)
    check_stored(steps, saver, checks)
    stages = by_stage(protocol, steps)
    checks.contexts(stages)
    checks.hooks(steps, session, needs_calibration(steps, info, model))
    datasets = _find_datasets(protocol, stages, checks, registry, config_path.parent, info, model)
    with _together_with(diagnostics):
        read = {dataset: _read(dataset, protocol) for dataset in dict.fromkeys(datasets)}
        samples = [
            _wanted(read[one][0], own, info, model, calib_samples) for one, own in zip(datasets, stages, strict=True)
        ]
        lengths = [
            token_lengths(session, some, calib_length, joined=not any(step.algorithm.replays for step in own))
            for some, own in zip(samples, stages, strict=True)
        ]
        unproven: Sequence[str] = ()
        if any(samples):
            unproven = prove_forward(session, model, checkpoint, kind, name, trust_remote_code, registry)
    runner = choose_runner(protocol, ranks, registry)
    diagnostics += runner.refusals
    if diagnostics:
        raise _refusal(config_path, diagnostics)
    plan = Plan(
        protocol=protocol,
        checkpoint=checkpoint,
        session=session,
        adapter=name,
        model=model,
        info=info,
        loader=loader,
        steps=stages[-1],
        saver=saver,
        planned=planned,
        samples=samples[-1],
        dataset=datasets[-1],
        calib_length=calib_length,
        device=resolved,
        runner=runner.name,
        runner_why=runner.why,
        registry=registry,
        topology=topology,
        rescaled=rescaled,
        added=added,
        target=target,
        practice=practice,
        warnings=[
            *([remark] if remark else []),
            *runner.warnings,
            *(remark for _, remarks in read.values() for remark in remarks),
            *_left_long([one for some in samples for one in some], calib_length),
            *unproven,
            *checks.warnings,
            *_left_float(info, model),
        ],
        lengths=lengths[-1],
        ranks=ranks,
        budget=budget,
        seconds=time.perf_counter() - start,
    )
    parts = enumerate(zip(stages[:-1], samples[:-1], datasets[:-1], lengths[:-1], strict=True))
    prior = [
        replace(plan, steps=own, samples=some, dataset=dataset, lengths=tokens, stage=number)
        for number, (own, some, dataset, tokens) in parts
    ]
    plan = replace(plan, prior=prior)
    for stage in plan.stages:
        _ = stage.costs  # refuses a budget that is too small
    started()
    return plan


def by_stage(protocol: Protocol, steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of each prior stage and of the main one; each knows what earlier stages quantize."""
    stages: list[list[Step]] = []
    done: frozenset[str] = frozenset()
    for place in (*(stage.path for stage in protocol.prior), ("spec", "process")):
        own = [replace(step, done=done) for step in steps if step.path[: len(place)] == place]
        done |= {step.info.linears[linear].module for step in own for linear in step.specs}
        stages.append(own)
    return stages


def _find_datasets(
    protocol: Protocol,
    stages: Sequence[Sequence[Step]],
    checks: Checks,
    registry: Registry,
    base: Path,
    info: ModelInfo,
    model: nn.Module,
) -> list[Path | None]:
    """The calibration set of each stage, None where none is wanted.

    A name that leads nowhere is a mistake in any case.
    """
    named = [(stage.dataset, (*stage.path, "dataset")) for stage in protocol.prior]
    main = protocol.dataset if "dataset" in protocol.document.value["spec"] else None
    found: dict[tuple[str | int, ...], Path | None] = {}
    datasets = []
    for (value, place), steps in zip([*named, (main, ("spec", "dataset"))], stages, strict=True):
        calibrate = needs_calibration(steps, info, model)
        where = place if value is not None else ("spec", "dataset")
        if where not in found and (calibrate or value is not None):
            try:
                name = protocol.dataset if value is None else value
                found[where] = find_dataset(name, registry, base, directories=protocol.is_multimodal)
            except DatasetError as error:
                checks.refuse(where, error.message, error.hint)
                found[where] = None
        datasets.append(found[where] if calibrate else None)
    return datasets


def _read(dataset: Path | None, protocol: Protocol) -> tuple[Sequence[Any], list[str]]:
    """The calibration samples, and what the user should know about them."""
    if dataset is None:
        return [], []
    if protocol.default_text is not None:
        return read_vlm_samples(dataset, protocol.default_text)
    return read_samples(dataset), []


def _wanted(
    samples: Sequence[Any], steps: Sequence[Step], info: ModelInfo, model: nn.Module, at_most: int | None
) -> Sequence[Any]:
    """As many of the samples as the algorithms want that calibrate and as the user allows, evenly spread."""
    limits = [step.algorithm.samples for step in steps if needs_calibration([step], info, model)]
    most = max((len(samples) if limit is None else limit for limit in limits), default=0)
    return choose_samples(samples, most if at_most is None else min(most, at_most))


def _left_long(samples: Sequence[Any], calib_length: int | None) -> list[str]:
    """A warning when samples will not be cut, because images, audio or video stand among their tokens."""
    count = 0 if calib_length is None else sum(map(holds_media, samples))
    return [f"--calib_length cuts texts only: {count} samples with images, audio or video stay whole"] if count else []


@contextmanager
def _together_with(diagnostics: Sequence[Diagnostic]) -> Iterator[None]:
    """Tell mistakes of the protocol together with another error, which must not hide them."""
    try:
        yield
    except ModelSlimError as error:
        error.diagnostics = [*error.diagnostics, *diagnostics]
        raise


def needs_calibration(steps: Sequence[Step], info: ModelInfo, model: nn.Module) -> bool:
    """True when an algorithm wants to know what flows through some unit."""
    return any(step.calibrates(step.unit(unit, model)) for unit in (*info.units, "") for step in steps)


def _left_float(info: ModelInfo, model: nn.Module) -> list[str]:
    """A warning when fused experts stay float, since they are mostly the larger part of a model."""
    experts = {name: prod(kept.shape) for name, kept in info.kept.items() if kept.why == "stacked experts"}
    if not experts:
        return []
    share = sum(experts.values()) / sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{len(experts)} weights of fused experts, such as {next(iter(experts))}, stay float: {share:.0%} of all "
        "parameters; they are stacked in a way that the adapter does not know"
    ]


def _refusal(config_path: Path, diagnostics: Sequence[Diagnostic]) -> ProtocolError:
    count = len(diagnostics)
    ordered = sorted(diagnostics, key=lambda diagnostic: (diagnostic.line or 0, diagnostic.column or 0))
    return ProtocolError(f"{config_path}: {count} mistake{'s' if count > 1 else ''}", diagnostics=ordered)
