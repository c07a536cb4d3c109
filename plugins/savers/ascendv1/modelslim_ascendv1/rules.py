# SPDX-License-Identifier: Apache-2.0
"""What the format does not allow, or no version of vLLM-Ascend, which reads it: one function per rule."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from modelslim.api import (
    PlannedLinear,
    PlannedModel,
    Problem,
    check_tied_head,
    fusions,
    group_by_spec,
    listed,
    planned_linears,
    scheme_in_words,
)
from modelslim_ascendv1.caches import check_caches
from modelslim_ascendv1.layout import SPARSE_FLOAT, TP_SLICES, is_row_parallel
from modelslim_ascendv1.schemes import refusals


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_shapes(storable),
        *_group_size(storable),
        *check_tied_head(linears, model),
        *_added_biases(linears, model),
        *_prefixes(linears, model),
        *check_caches(model),
        *_float32_static(storable, model),
        *_float32_sparse(storable),
    ]


def _unknown_schemes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, members in group_by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"ascendv1 has no type for {refusal.what} ({listed(members)})",
                hint=refusal.hint,
                linear=members[0].info.name,
            )


def _shapes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, same_spec in group_by_spec(linears).items():
        by_columns: dict[int, list[PlannedLinear]] = defaultdict(list)
        for linear in same_spec:
            by_columns[linear.info.in_features].append(linear)
        for columns, members in by_columns.items():
            if spec.scheme == "W4A16" and columns % 8:
                yield Problem(
                    f"W4A16 packs 8 inputs into one integer, which {columns} inputs do not fill ({listed(members)})",
                    hint="exclude them, or use int8 for the weight",
                    linear=members[0].info.name,
                )
            if "MXFP" in spec.scheme and columns % 32:
                yield Problem(
                    f"{spec.scheme} has blocks of 32 inputs, which {columns} inputs do not fill ({listed(members)})",
                    hint="exclude them, or use fp8_e4m3",
                    linear=members[0].info.name,
                )
            sliced = [linear for linear in members if is_row_parallel(linear.info.stored)]
            if spec.scheme == "W4A8_DYNAMIC" and columns % TP_SLICES and sliced:
                yield Problem(
                    f"W4A8_DYNAMIC cuts inputs into {TP_SLICES} equal slices, which {columns} inputs do not give "
                    f"({listed(sliced)})",
                    hint="exclude them, or use int8 for the weight",
                    linear=sliced[0].info.name,
                )
        odd = [linear for linear in same_spec if linear.info.out_features % 2]
        if spec.scheme == "W4A8_DYNAMIC" and odd:
            yield Problem(
                f"W4A8_DYNAMIC packs two outputs into one byte, and their number is odd ({listed(odd)})",
                hint="exclude them, or use int8 for the weight",
                linear=odd[0].info.name,
            )


def _group_size(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    sizes: dict[int, PlannedLinear] = {}
    packed: PlannedLinear | None = None
    for linear in linears:
        assert linear.spec is not None
        if linear.spec.weight.group_size:
            sizes.setdefault(linear.spec.weight.group_size, linear)
        elif linear.spec.scheme == "W4A8_DYNAMIC" and packed is None:
            packed = linear
    if len(sizes) > 1:
        found = [f"{size} ({linear.info.name})" for size, linear in sorted(sizes.items())]
        yield Problem(
            f"ascendv1 holds one group_size for the whole model, and there are {len(sizes)}: {', '.join(found)}",
            hint="use one group_size everywhere",
            linear=list(sizes.values())[-1].info.name,
        )
    if sizes and packed is not None:
        size, grouped = next(iter(sizes.items()))
        yield Problem(
            f"ascendv1 holds one group_size for the whole model: W4A8_DYNAMIC ({packed.info.name}) needs 0, and "
            f"{scheme_in_words(grouped.spec)} ({grouped.info.name}) needs {size}",
            hint="use scope per_channel for the weights of the latter, or one scheme for both",
            linear=grouped.info.name,
        )


def _added_biases(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    """A bias that the architecture does not have reaches the engine inside ``quant_bias`` only."""
    added = [linear for linear in linears if linear.info.name in model.added_biases]
    lost = [linear for linear in added if linear.spec is None or linear.spec.scheme not in ("W8A8", "W8A8S")]
    if lost:
        quantized = [linear.info.name for linear in lost if linear.spec is not None]
        yield Problem(
            f"vLLM-Ascend passes over a bias that the model was built without, unless the scheme is W8A8 with static "
            f"activations; smoothing adds one to {listed(lost)}",
            hint="smooth with symmetric: true, or quantize these linears with per_tensor activations",
            linear=quantized[0] if quantized else None,
        )


def _prefixes(linears: Sequence[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    # The engine leaves a linear in float if any FLOAT `.weight` key begins with its name. Fused linears and
    # experts are looked up by their exact keys instead.
    exact = {member.info.stored for _, members in fusions(linears) for member in members}
    quantized = [linear for linear in linears if linear.spec is not None]
    names = {name for name in model.tensors if name.endswith(".weight")}
    names.update(f"{linear.info.stored}.weight" for linear in linears if linear.spec is None)
    floats = sorted(names - {f"{linear.info.stored}.weight" for linear in quantized})
    places: dict[tuple[str, str], list[PlannedLinear]] = defaultdict(list)
    for linear in quantized:
        at = bisect_left(floats, linear.info.stored)
        clash = floats[at] if at < len(floats) else ""
        if clash.startswith(linear.info.stored) and not linear.moe and linear.info.stored not in exact:
            places[linear.last, clash.removeprefix(linear.parent)].append(linear)
    for (last, clash), members in places.items():
        first = members[0]
        yield Problem(
            f"vLLM-Ascend would run {listed(members)} in float: it does so with every linear whose name begins the "
            f"name of a float weight, here {first.parent}{clash}",
            hint=f"exclude {last}, or quantize {clash.lstrip('.').removesuffix('.weight')} too",
            linear=first.info.name,
        )


def _float32_sparse(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    members = [one for one in linears if one.spec is not None and one.spec.scheme == SPARSE_FLOAT]
    wide = [one for one in members if one.info.dtype not in ("bfloat16", "float16")]
    if wide:
        yield Problem(
            f"{SPARSE_FLOAT} is for weights of 16 bits, and these are {wide[0].info.dtype} ({listed(wide)})",
            hint="what compresses them may not take them; save the model in bfloat16 or float16 first",
            linear=wide[0].info.name,
            fatal=False,
        )


def _float32_static(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.spec is not None and linear.spec.scheme == "W8A8"]
    if members and model.dtype not in ("bfloat16", "float16"):
        yield Problem(
            f"the model is {model.dtype}, and W8A8 stores deq_scale as the engine reads it for float16",
            hint="serve the result with --dtype float16; in bfloat16 its outputs would be wrong",
            linear=members[0].info.name,
            fatal=False,
        )
