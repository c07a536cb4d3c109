# SPDX-License-Identifier: Apache-2.0
"""What the format, or all its readers, do not allow: one function per rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from modelslim.api import (
    FUSED,
    PlannedLinear,
    PlannedModel,
    Problem,
    check_tied_head,
    group_by_spec,
    listed,
    planned_linears,
)
from modelslim_awq.codec import PER_WORD
from modelslim_awq.config import float_names
from modelslim_awq.schemes import refusals


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_one_group_size(storable),
        *_outputs(storable),
        *check_tied_head(linears, model),
        *_head(linears),
        *_added_biases(linears, model),
        *_names(linears, model),
        *_experts_in_transformers(storable),
        *_float32(storable, model),
    ]


def _unknown_schemes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, members in group_by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"AWQ has no {refusal.what} ({listed(members)})", hint=refusal.hint, linear=members[0].info.name
            )


def _one_group_size(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    by_size: dict[int | None, list[PlannedLinear]] = defaultdict(list)
    for linear in linears:
        assert linear.spec is not None
        by_size[linear.spec.weight.group_size].append(linear)
    if len(by_size) > 1:
        found = [f"{size or 'per_channel'} ({listed(members)})" for size, members in by_size.items()]
        yield Problem(
            f"AWQ holds one group_size for the whole model, and there are {len(by_size)}: {', '.join(found)}",
            hint="use one group_size everywhere, or exclude the others",
            linear=list(by_size.values())[-1][0].info.name,
        )


def _outputs(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    broken = [linear for linear in linears if linear.info.out_features % PER_WORD]
    if broken:
        yield Problem(
            f"AWQ packs {PER_WORD} outputs into one integer, which {broken[0].info.out_features} outputs do not fill "
            f"({listed(broken)})",
            hint="exclude them",
            linear=broken[0].info.name,
        )


def _head(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for linear in linears:
        if linear.spec is not None and linear.last == "lm_head":
            yield Problem(
                f"transformers holds {linear.info.name} in float whatever an AWQ checkpoint says, and would leave it "
                "without a weight",
                hint='take "lm_head" out of include',
                linear=linear.info.name,
            )


def _added_biases(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    lost = [linear for linear in linears if linear.info.name in model.added_biases]
    if lost:
        quantized = [linear.info.name for linear in lost if linear.spec is not None]
        yield Problem(
            f"vLLM and transformers pass over a bias that the model was built without; smoothing adds one to "
            f"{listed(lost)}",
            hint="smooth with symmetric: true",
            linear=quantized[0] if quantized else None,
        )


def _names(linears: Sequence[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    """Readers leave a linear in float when its name, or that of the linear it is fused into, contains a listed one."""
    quantized = {linear.info.stored for linear in linears if linear.spec is not None}
    listed_names = set(float_names(model, dict.fromkeys(quantized)))
    seen = set()
    for linear in linears:
        if linear.spec is None:
            continue
        names = [linear.moe or linear.info.stored]
        names += [f"{linear.parent}.{fused}" for fused, parts in FUSED.items() if linear.last in parts]
        clash = next((name[:end] for name in names for end in range(1, len(name)) if name[:end] in listed_names), None)
        if clash is not None and clash not in seen:
            seen.add(clash)
            yield Problem(
                f"vLLM would run {linear.info.name} in float, because its name, or that of the linear it becomes part "
                f"of, begins with that of {clash}, which stays float",
                hint=f"exclude {linear.info.name} too",
                linear=linear.info.name,
            )


def _experts_in_transformers(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    experts = [linear for linear in linears if linear.moe]
    if experts:
        yield Problem(
            f"transformers holds all experts of a layer in one tensor and will not load them quantized "
            f"({listed(experts)}); vLLM does",
            hint="serve the result with vLLM, or exclude the experts",
            linear=experts[0].info.name,
            fatal=False,
        )


def _float32(linears: Sequence[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    if linears and model.dtype not in ("bfloat16", "float16"):
        yield Problem(
            f"the model is {model.dtype}, in which no reader of AWQ computes; scales are stored in float16",
            hint="serve the result in float16",
            linear=linears[0].info.name,
            fatal=False,
        )
