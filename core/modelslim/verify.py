# SPDX-License-Identifier: Apache-2.0
"""Checks a quantized checkpoint without running it: its files, its tensors, its numbers, and what an engine wants."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint, StoredTensor, read_json
from modelslim.engine_rules import Target, check_model, choose_target
from modelslim.engines import find_contract
from modelslim.errors import ModelError
from modelslim.loader import Loader
from modelslim.model_info import describe
from modelslim.registry import Registry
from modelslim.report import REPORT
from modelslim.saved import find_saver
from modelslim.saved_config import named_as_float, opened_as_float
from modelslim.saver import EngineAnswer, PlannedModel, Saver
from modelslim.types import Problem
from modelslim.verify_files import check_engine_files, read_files
from modelslim.verify_numbers import LinearError, Numbers
from modelslim.verify_structure import Expected, Result, added_biases, check_structure

if TYPE_CHECKING:
    from modelslim.plan import Plan


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        path: the directory.
        format: name of the saver that writes such checkpoints; empty when none is known.
        engine: name of the contract that it was checked against; empty for none.
        asked: what of the engine's own Python has loaded it without its data, with versions; empty when nothing has.
        by_contract: why all of it, or a part, was checked by the contract only; empty when no engine was named.
        problems: what is wrong, and with ``fatal`` False what one should know.
        schemes: how many linears have which scheme.
        float_linears: names of the linears that are float.
        errors: how far each quantized weight is from the float one, by the linear's name; empty without a source.
    """

    path: Path
    format: str = ""
    engine: str = ""
    asked: str = ""
    by_contract: str = ""
    problems: Sequence[Problem] = ()
    schemes: Mapping[str, int] = field(default_factory=dict)
    float_linears: Sequence[str] = ()
    errors: Mapping[str, LinearError] = field(default_factory=dict)

    @property
    def faults(self) -> list[Problem]:
        """The problems for which the checkpoint must not be used."""
        return [problem for problem in self.problems if problem.fatal]

    def as_data(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        keys = ("message", "hint", "linear", "fatal")
        return {
            "path": str(self.path),
            "format": self.format,
            "engine": self.engine,
            "asked": self.asked,
            "by_contract": self.by_contract,
            "good": not self.faults,
            "problems": [{key: getattr(problem, key) for key in keys} for problem in self.problems],
            "schemes": dict(self.schemes),
            "float_linears": list(self.float_linears),
            "errors": {name: {**asdict(error), "limit": error.limit} for name, error in self.errors.items()},
        }


def verify(
    path: Path,
    float_path: Path | None = None,
    *,
    engine: str | None = None,
    tp: int = 1,
    trust_remote_code: bool = False,
) -> Verification:
    """Check a quantized checkpoint.

    Args:
        path: its directory.
        float_path: the float model that it was made from; None to do without.
        engine: refuse what this engine does not load, such as ``vllm-ascend`` or ``vllm-0.32``; None to be told
            of what the engine that the format is for does not load.
        tp: the engine's degree of tensor parallelism.
        trust_remote_code: allow code of the checkpoint to run.

    Raises:
        UsageError: no contract is known of the engine.
        ModelError, PluginError: the float model cannot be opened.
    """
    registry = Registry.scan()
    if engine is not None:
        find_contract(engine, registry)  # a misspelt name must not wait behind a fault
    files = read_files(path)
    found = Verification(path, problems=files.problems)
    if not files.complete:
        return found
    try:
        format_, kind = find_saver(path, registry)
        saver = kind.of_checkpoint(path)
        shapes = {name: stored.shape for name, stored in files.tensors.items()}
        saved, caches = saver.read_layout(path, shapes), saver.read_caches(path, shapes)
        config = read_json(path / "config.json")
        problems = [*files.problems, *saver.check_files(path)]
    except ModelError as error:
        return replace(found, problems=[*files.problems, Problem(error.message, error.hint)])
    target = choose_target(engine, tp, saver, registry)
    found = replace(found, format=format_, engine=target.contract.name if target else "")
    rules = target.contract.formats.get(format_) if target else None
    if target and rules:
        problems += _asked(target, check_engine_files(path, config, rules, target.contract))
    with ExitStack() as stack:
        told = _read_report(path)
        try:
            if float_path:
                source = stack.enter_context(Checkpoint(float_path))
                expected = _open(source, float_path, registry, trust_remote_code, is_source=True)
            else:
                own = stack.enter_context(Checkpoint(path, named_as_float(files.tensors, saved)))
                directory = stack.enter_context(opened_as_float(own))
                expected = _open(own, directory, registry, trust_remote_code, is_source=False)
                expected = replace(expected, left_out=told.left_out)
            expected = replace(expected, added=added_biases(expected.model, expected.loader, told.rescaled))
        except ModelError as error:
            if float_path:
                raise
            return replace(found, problems=[*problems, Problem(error.message, error.hint)])
        result = Result(expected, files.tensors, saved, caches)
        problems += check_structure(result)
        checkpoint = stack.enter_context(Checkpoint(path, files.tensors))
        numbers = Numbers(result, checkpoint, saver, told.modules)
        problems += [*numbers.check(), *numbers.check_floats()]
        planned = result.planned(config, numbers.multiplied)
        problems += check_model(saver, format_, target, planned)
        answer = _ask(engine, target, saver, path, planned, files.tensors)
        problems += answer.problems
        return replace(
            found,
            asked=answer.asked,
            by_contract=answer.reason,
            problems=_once(problems),
            schemes=dict(Counter(spec.scheme for spec in result.specs.values())),
            float_linears=result.floats,
            errors=numbers.errors,
        )


def verify_run(plan: Plan, path: Path, units: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """What is wrong with the result of a run, before it gets its name; the float model is not read again.

    Args:
        plan: the run's plan.
        path: the directory that was written.
        units: the records of its units.
    """
    files = read_files(path)
    if not files.complete:
        return list(files.problems)
    problems = list(files.problems)
    try:
        shapes = {name: stored.shape for name, stored in files.tensors.items()}
        saved, caches = plan.saver.read_layout(path, shapes), plan.saver.read_caches(path, shapes)
        problems += plan.saver.check_files(path)
    except ModelError as error:
        return [*problems, Problem(error.message, error.hint)]
    added = added_biases(plan.model, plan.loader, plan.added)
    expected = Expected(plan.model, plan.info, plan.loader, plan.checkpoint, plan.left_out, added)
    result = Result(expected, files.tensors, saved, caches)
    problems += check_structure(result)
    problems += _promised(plan, result, units)
    with Checkpoint(path, files.tensors) as checkpoint:
        problems += Numbers(result, checkpoint, plan.saver).check(compare=False)
    return [problem for problem in _once(problems) if problem.fatal]


def _promised(plan: Plan, result: Result, units: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Linears that are not what the run says that it made of them."""
    made = {module: scheme for unit in units for module, scheme in unit["linears"].items()}
    for name in plan.specs:
        linear = plan.info.linears[name]
        scheme = made.get(linear.module, "FLOAT")
        spec = result.specs.get(name)
        if scheme != (spec.scheme if spec else "FLOAT"):
            is_now = spec.scheme if spec else "FLOAT"
            yield Problem(f"{linear.stored} was made {scheme}, and is {is_now} in the result", linear=name)


def _asked(target: Target, problems: Iterator[Problem]) -> list[Problem]:
    return [replace(problem, fatal=target.asked) for problem in problems]


def _ask(
    engine: str | None,
    target: Target | None,
    saver: Saver,
    path: Path,
    model: PlannedModel,
    tensors: Mapping[str, StoredTensor],
) -> EngineAnswer:
    """What the engine's own Python says, where the user names the engine.

    Where the user names a version, the installed one may be another: what it refuses is then a warning.
    """
    if target is None or engine is None:
        return EngineAnswer()
    on_meta = {name: torch.empty(one.shape, dtype=one.torch_dtype, device="meta") for name, one in tensors.items()}
    answer = saver.ask_engine(target.contract.engine, path, model, on_meta)
    named = engine.casefold() == target.contract.engine
    return replace(answer, problems=[replace(one, fatal=one.fatal and named) for one in answer.problems])


def _open(
    checkpoint: Checkpoint, directory: Path, registry: Registry, trust_remote_code: bool, *, is_source: bool
) -> Expected:
    kind, name, _ = choose_adapter(checkpoint.config, None, registry)
    model_type = checkpoint.config["model_type"]
    session = open_session(kind, name, model_type, directory, trust_remote_code, registry)
    checkpoint.decode(session.get_decoded_tensors(checkpoint.stored))
    model = session.init_model("meta")
    loader = Loader(model, checkpoint, session.get_weight_sources(model, checkpoint.shapes), "cpu")
    if is_source:
        loader.require_fit()
    info = describe(model, list(session.generate_model_visit(model)), loader)
    if not is_source:
        return Expected(model, info, loader, None, None)
    taken = {key for source in loader.sources.values() for key in source.keys}
    return Expected(model, info, loader, checkpoint, frozenset(checkpoint.tensors.keys() - taken))


@dataclass(frozen=True)
class _Told:
    """What a run's report says of its result; None where there is no report.

    Attributes:
        rescaled: full names of the parameters that smoothing has changed or added.
        left_out: tensors that no parameter of the model takes.
    """

    rescaled: frozenset[str] | None = None
    left_out: frozenset[str] | None = None

    @property
    def modules(self) -> frozenset[str] | None:
        """Owners of these parameters."""
        return None if self.rescaled is None else frozenset(name.rpartition(".")[0] for name in self.rescaled)


def _read_report(path: Path) -> _Told:
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        return _Told(frozenset(map(str, report["rescaled"])), frozenset(map(str, report["left_out"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or somebody else's file of that name
        return _Told()


def _once(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once: several rules may see the same fault."""
    return list({problem.message: problem for problem in sorted(problems, key=lambda one: one.fatal)}.values())
