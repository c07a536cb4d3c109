# SPDX-License-Identifier: Apache-2.0
"""Resolves and checks all that can fail before a weight is read."""

from __future__ import annotations

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
from modelslim.protocol.model import Protocol
from modelslim.protocol.validate import read_protocol
from modelslim.registry import Registry
from modelslim.runners.choice import choose_runner
from modelslim.sampling import choose_samples
from modelslim.saver import PlannedModel, Saver
from modelslim.session import Session
from modelslim.token_lengths import token_lengths
from modelslim.types import Problem, QuantSpec, Topology
from modelslim.vlm_dataset import read_vlm_samples

if TYPE_CHECKING:
    from modelslim.plan_costs import Costs
    from modelslim.practice_choice import Choice


@dataclass(frozen=True)
class Plan:
    """All that a run needs, checked.

    Attributes:
        protocol: what the YAML says.
        checkpoint: the source, open.
        session: the adapter and the other plugins of this run.
        adapter: name of the adapter's entry point.
        model: the model on meta.
        info: its structure.
        loader: fills ``model`` on ``device``; knows the source of every parameter.
        steps: the algorithms, in the order of the protocol, groups unfolded.
        saver: the saver.
        planned: what the saver was told.
        samples: calibration samples; empty when no algorithm needs any.
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

    @cached_property
    def costs(self) -> Costs:
        """What the run is expected to hold and to take, and how it keeps to the budget.

        Raises:
            UsageError: the budget is too small.
        """
        from modelslim.plan_costs import find_costs  # which needs plans itself

        return find_costs(self)

    @property
    def specs(self) -> Mapping[str, QuantSpec]:
        """What the quantized linears become, by name."""
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
        """What the modules of a unit become whose linears are quantized, by name."""
        return {one.module: self.specs[one.name] for one in self.info.by_unit[unit] if one.name in self.specs}

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

    Raises:
        ProtocolError, PluginError, CapabilityError, ModelError, DatasetError, UsageError: before
            any weight is read.
    """
    registry = Registry.scan()
    protocol, diagnostics = read_protocol(config_path, registry)
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
    steps = checks.steps(((entry.path, entry.config) for entry in protocol.process), registry)
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
    calibrate = needs_calibration(steps, info, model)
    checks.hooks(steps, session, calibrate)
    dataset = _find_dataset(protocol, checks, registry, config_path.parent, calibrate)
    with _together_with(diagnostics):
        samples, remarks = _read(dataset, protocol)
        samples = _wanted(samples, steps, info, model, calib_samples)
        joined = not any(step.algorithm.replays for step in steps)
        lengths = token_lengths(session, samples, calib_length, joined=joined)
        unproven = prove_forward(session, model, checkpoint, kind, name, trust_remote_code, registry) if samples else []
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
        steps=steps,
        saver=saver,
        planned=planned,
        samples=samples,
        dataset=dataset,
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
            *remarks,
            *_left_long(samples, calib_length),
            *unproven,
            *checks.warnings,
            *_left_float(info, model),
        ],
        lengths=lengths,
        ranks=ranks,
        budget=budget,
    )
    _ = plan.costs  # refuses a budget that is too small
    return plan


def _find_dataset(protocol: Protocol, checks: Checks, registry: Registry, base: Path, calibrate: bool) -> Path | None:
    """The calibration set, None when it is not wanted; a name that leads nowhere is a mistake in any case."""
    if not calibrate and "dataset" not in protocol.document.value["spec"]:
        return None
    try:
        dataset = find_dataset(protocol.dataset, registry, base, directories=protocol.is_multimodal)
    except DatasetError as error:
        checks.refuse(("spec", "dataset"), error.message, error.hint)
        return None
    return dataset if calibrate else None


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
