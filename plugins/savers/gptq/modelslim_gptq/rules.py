# SPDX-License-Identifier: Apache-2.0
"""What the format, or all its readers, do not allow: one function per rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from modelslim.api import (
    PlannedLinear,
    PlannedModel,
    Problem,
    check_tied_head,
    group_by_spec,
    listed,
    planned_linears,
    scheme_in_words,
)
from modelslim_gptq.codec import WORD_BITS
from modelslim_gptq.schemes import refusals


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_one_scheme(storable),
        *_shapes(storable),
        *check_tied_head(linears, model),
        *_added_biases(linears, model),
        *_names(linears),
        *_experts_in_transformers(storable),
        *_float32(storable, model),
    ]


def _unknown_schemes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, members in group_by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"GPTQ has no {refusal.what} ({listed(members)})", hint=refusal.hint, linear=members[0].info.name
            )


def _one_scheme(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    by_spec = group_by_spec(linears)
    if len(by_spec) > 1:
        found = [f"{scheme_in_words(spec)} ({listed(members)})" for spec, members in by_spec.items()]
        yield Problem(
            f"GPTQ holds one scheme for the whole model, and there are {len(by_spec)}: {', '.join(found)}",
            hint="use one qconfig everywhere, or exclude the others",
            linear=list(by_spec.values())[-1][0].info.name,
        )


def _shapes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, members in group_by_spec(linears).items():
        bits = spec.weight.bits
        for what, broken in (
            ("inputs", [linear for linear in members if linear.info.in_features * bits % WORD_BITS]),
            ("outputs", [linear for linear in members if linear.info.out_features * bits % WORD_BITS]),
        ):
            if broken:
                info = broken[0].info
                count = info.in_features if what == "inputs" else info.out_features
                yield Problem(
                    f"GPTQ packs codes of {bits} bits into words of {WORD_BITS}, which {count} {what} do not fill "
                    f"({listed(broken)})",
                    hint="exclude them",
                    linear=info.name,
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


def _names(linears: Sequence[PlannedLinear]) -> Iterator[Problem]:
    """vLLM takes a linear for quantized when its name contains the name of one that is."""
    dense = [linear for linear in linears if not linear.moe]
    quantized = {linear.info.stored for linear in dense if linear.spec is not None}
    for linear in dense:
        stored = linear.info.stored
        clash = next((stored[:end] for end in range(1, len(stored)) if stored[:end] in quantized), None)
        if linear.spec is None and clash is not None:
            yield Problem(
                f"vLLM would take {linear.info.name}, which stays float, for quantized, because its name begins with "
                f"that of {clash}",
                hint=f"exclude {clash} too",
                linear=next(one.info.name for one in dense if one.info.stored == clash),
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
            f"the model is {model.dtype}, in which neither vLLM nor GPTQModel computes; scales are stored in float16",
            hint="serve the result in float16",
            linear=linears[0].info.name,
            fatal=False,
        )
