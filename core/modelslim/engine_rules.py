# SPDX-License-Identifier: Apache-2.0
"""What of a model an engine would not load, by its contract: one function per rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modelslim.engines import DENSE, EXPERTS, Contract, FormatRules, find_contract
from modelslim.planned import PlannedLinear, check_experts, check_fused, group_by_spec, listed, planned_linears
from modelslim.registry import Registry
from modelslim.saver import PlannedModel, Saver
from modelslim.types import Problem, QuantSpec

_STACKED = (".experts.gate_up_proj", ".experts.down_proj")


@dataclass(frozen=True)
class Target:
    """Which engine reads the result, and how it is run.

    Attributes:
        contract: what the engine loads.
        tp: the degree of tensor parallelism.
        asked: True when the user named the engine. What it cannot load is then refused. Otherwise schemes that it
            lacks are warnings, since another version may have them; no version takes fused linears apart.
    """

    contract: Contract
    tp: int = 1
    asked: bool = False


def find_problems(target: Target, saver: str, model: PlannedModel) -> list[Problem]:
    """What the engine would not load of a model in a format.

    Args:
        target: the engine.
        saver: name of the saver that writes the format.
        model: the planned model, or one that was read from a checkpoint.
    """
    contract = target.contract
    rules = contract.formats.get(saver)
    if rules is None:
        known = ", ".join(sorted(contract.formats))
        message = _named(f"{contract.title} does not read what {saver} writes", contract, "formats")
        return [Problem(message, f"it reads what these write: {known}", fatal=target.asked)]
    view = _View(model, planned_linears(model), rules, contract.title, target.tp)
    return [
        replace(problem, message=_named(problem.message, contract, name), fatal=strict or target.asked)
        for name, rule, strict in _RULES
        for problem in rule(view)
    ]


def check_model(saver: Saver, name: str, target: Target | None, model: PlannedModel) -> list[Problem]:
    """What a saver cannot write of a model, and what the engine would not load of what it can.

    Args:
        saver: the saver.
        name: its name.
        target: the engine; None for none.
        model: the planned model, or one that was read from a checkpoint.
    """
    found: list[Problem] = []
    if not saver.stores_sparse:
        sparse = {linear: spec for linear, spec in model.specs.items() if spec.weight.sparse}
        for spec, members in group_by_spec(planned_linears(replace(model, specs=sparse))).items():
            message = f"{name} has no type for sparse weights, here {spec.scheme} ({listed(members)})"
            found.append(Problem(message, "write them with ascendv1_saver", linear=members[0].info.name))
        model = replace(model, specs={linear: model.specs[linear] for linear in model.specs.keys() - sparse.keys()})
    found += saver.check(model)
    if target is None:
        return found
    refused = {problem.linear for problem in found if problem.fatal and problem.linear is not None}
    return [*found, *(problem for problem in find_problems(target, name, model) if problem.linear not in refused)]


@dataclass(frozen=True)
class _View:
    """What the rules look at."""

    model: PlannedModel
    linears: Sequence[PlannedLinear]
    rules: FormatRules
    title: str
    tp: int


def choose_target(engine: str | None, tp: int, saver: Saver, registry: Registry) -> Target | None:
    """The engine that the user names, else the one that the saver writes for; None when neither says one.

    Raises:
        UsageError: no contract is known of it.
    """
    name = engine or saver.engine
    return Target(find_contract(name, registry), tp, engine is not None) if name else None


def _named(message: str, contract: Contract, rule: str) -> str:
    """A message with the rule and where it stands."""
    return f"{message} [{contract.name}: {rule}]"


def _fused(view: _View) -> Iterator[Problem]:
    return check_fused(view.linears, view.title, view.rules.fused)


def _experts(view: _View) -> Iterator[Problem]:
    return check_experts(view.linears if view.rules.experts_share_scheme else (), view.title)


def _float(view: _View) -> Iterator[Problem]:
    for name, reason in view.rules.float_linears.items():
        members = [one for one in view.linears if f".{one.info.stored}".endswith(f".{name}") and one.spec is not None]
        if members:
            yield Problem(
                f"{view.title} takes {name} in float only: {reason} ({listed(members)})",
                hint=f'add "*.{name}" to exclude',
                linear=members[0].info.name,
            )


def _schemes(view: _View) -> Iterator[Problem]:
    for (spec, place), members in _by_spec(view.linears).items():
        offered = view.rules.schemes
        if offered is None or any(place in one.places and not one.misfits(spec) for one in offered):
            continue
        here = sorted({one.name for one in offered if place in one.places})
        what = "experts" if place == EXPERTS else "dense linears"
        near: list[list[str]] = [
            one.misfits(spec) for one in offered if place in one.places and one.name == spec.scheme
        ]
        if near:
            closest = min(near, key=len)
            only = " and ".join(closest)
            message = f"{view.title} runs {spec.scheme} for {what} with {only}; it will not load {listed(members)}"
        elif any(one.name == spec.scheme for one in offered):
            other = "dense linears" if place == EXPERTS else "experts"
            message = f"{view.title} runs {spec.scheme} for {other} only; it will not load {listed(members)}"
        else:
            message = f"{view.title} has no {spec.scheme}; it will not load {listed(members)}"
        yield Problem(message, hint=f"for {what} it has {', '.join(here)}", linear=members[0].info.name)


def _shapes(view: _View) -> Iterator[Problem]:
    for (spec, place), members in _by_spec(view.linears).items():
        scheme = next((one for one in view.rules.schemes or () if place in one.places and not one.misfits(spec)), None)
        if scheme is None:
            continue
        where = f" with tensor parallelism {view.tp}" if view.tp > 1 else ""
        ranks = {True: view.tp, False: 1}
        thin = [one for one in members if one.info.in_features % (scheme.in_multiple * ranks[_cut(one, view.rules)])]
        if thin:
            yield Problem(
                f"{view.title} needs a multiple of {scheme.in_multiple} inputs on each rank for {spec.scheme}{where}, "
                f"which {thin[0].info.in_features} are not ({listed(thin)})",
                hint="exclude them, or choose another scheme",
                linear=thin[0].info.name,
            )
        short = [one for one in members if one.info.out_features % scheme.out_multiple]
        if short:
            yield Problem(
                f"{view.title} needs a multiple of {scheme.out_multiple} outputs for {spec.scheme}, which "
                f"{short[0].info.out_features} are not ({listed(short)})",
                hint="exclude them, or choose another scheme",
                linear=short[0].info.name,
            )


def _tensor_parallel(view: _View) -> Iterator[Problem]:
    """Groups and blocks may not be cut between two ranks."""
    if view.tp == 1:
        return
    for (spec, place), members in _by_spec(view.linears).items():
        size, rows = spec.weight.group_size or 1, spec.weight.group_rows
        cut = [one for one in members if _cut(one, view.rules) and one.info.in_features % (size * view.tp)]
        if cut:
            yield Problem(
                f"{view.title} cuts inputs into {view.tp} equal parts of whole groups of {size}, which "
                f"{cut[0].info.in_features} inputs do not give ({listed(cut)})",
                hint="use a smaller group_size, per_channel, or fewer ranks",
                linear=cut[0].info.name,
            )
        blocks = [
            one
            for one in members
            if rows > 1 and not _cut(one, view.rules) and one.info.out_features % (rows * view.tp)
        ]
        if blocks:
            yield Problem(
                f"{view.title} cuts outputs into {view.tp} equal parts of whole blocks of {rows}, which "
                f"{blocks[0].info.out_features} outputs do not give ({listed(blocks)})",
                hint="use per_channel, or fewer ranks",
                linear=blocks[0].info.name,
            )
        limits = (one.max_tp for one in view.rules.schemes or () if place in one.places and not one.misfits(spec))
        limit = next(limits, 0)
        if limit and limit % view.tp:
            yield Problem(
                f"{view.title} runs {spec.scheme} on a number of ranks that divides {limit}, which {view.tp} does not "
                f"({listed(members)})",
                hint=f"serve it on 1, 2, 4, ... up to {limit} ranks",
                linear=members[0].info.name,
            )


def _multiplied(view: _View) -> Iterator[Problem]:
    members = [one for one in view.linears if one.info.has_multiplier]
    if members and not view.rules.multiplied_inputs:
        yield Problem(
            f"{view.title} has no linear whose input is multiplied first; it will not load {listed(members)}",
            hint="take non-fusion out of enable_subgraph_type",
            linear=members[0].info.name,
        )


def _caches(view: _View) -> Iterator[Problem]:
    for name, spec in view.model.cache_specs.items():
        if view.rules.caches is not None and all(any(True for _ in one.misfits(spec)) for one in view.rules.caches):
            known = " or ".join(one.dtype for one in view.rules.caches) or "none"
            more = f" and {len(view.model.cache_specs) - 1} more" if len(view.model.cache_specs) > 1 else ""
            yield Problem(
                f"{view.title} has no key/value caches of {spec.dtype} {spec.scope} ({name}{more})",
                hint=f"it has {known}",
            )
            return


def _stacked(view: _View) -> Iterator[Problem]:
    taken_apart = {linear.moe for linear in view.linears if linear.spec is not None}
    names = (name for name in view.model.tensors if name.endswith(_STACKED))
    stacked = sorted(name for name in names if name.rpartition(".")[0] not in taken_apart)
    if stacked and view.model.specs and not view.rules.stacked_experts:
        yield Problem(
            f"the experts of a layer are stored as one tensor ({stacked[0]}, and {len(stacked) - 1} more), and "
            f"{view.title} looks for one linear per expert in a quantized model",
            hint="quantize them, where the adapter can take them apart: they are then written one by one",
        )


Rule = Callable[[_View], Iterator[Problem]]

_RULES: Sequence[tuple[str, Rule, bool]] = (
    ("fused", _fused, True),
    ("experts_share_scheme", _experts, True),
    ("float", _float, True),
    ("schemes", _schemes, False),
    ("multiplied_inputs", _multiplied, False),
    ("caches", _caches, False),
    ("stacked_experts", _stacked, False),
    ("shapes", _shapes, False),
    ("tensor_parallel", _tensor_parallel, False),
)
"""Name in the contract, the rule, and whether it holds for every version of an engine."""


def _by_spec(linears: Iterable[PlannedLinear]) -> Mapping[tuple[QuantSpec, str], list[PlannedLinear]]:
    """The quantized linears by what they become and by their place."""
    groups: dict[tuple[QuantSpec, str], list[PlannedLinear]] = defaultdict(list)
    for linear in linears:
        if linear.spec is not None:
            groups[linear.spec, EXPERTS if linear.moe else DENSE].append(linear)
    return groups


def _cut(linear: PlannedLinear, rules: FormatRules) -> bool:
    """True when tensor parallelism cuts the linear along its inputs."""
    return linear.last in rules.row_parallel
