# SPDX-License-Identifier: Apache-2.0
"""Warnings: what the format can hold and vLLM-Ascend does not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from modelslim.api import PlannedModel, Problem
from modelslim_ascendv1.planned import Linear, by_spec, listed

ENGINE_TYPES: Mapping[bool, frozenset[str]] = {
    False: frozenset(
        {
            "W8A8",
            "W8A8_DYNAMIC",
            "W8A8_MIX",
            "W8A16",
            "W8A8FP8_DYNAMIC",
            "W4A4_DYNAMIC",
            "W8A8_MXFP8",
            "W4A8_MXFP",
            "W4A4_MXFP4",
        }
    ),
    True: frozenset(
        {
            "W8A8_DYNAMIC",
            "W4A8_DYNAMIC",
            "W4A16",
            "W8A8FP8_DYNAMIC",
            "W8A8_MXFP8",
            "W4A8_MXFP",
            "W4A4_MXFP4",
            "W4A16_MXFP4",
        }
    ),
}
"""Types that the engine can run, for routed experts (True) and for all other linears (False)."""

_STACKED_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")


def find_warnings(linears: Sequence[Linear], model: PlannedModel) -> Iterator[Problem]:
    """All warnings.

    Args:
        linears: those whose scheme the format can hold.
        model: the planned model.
    """
    yield from _types(linears)
    yield from _groups(linears)
    yield from _float32_static(linears, model)
    yield from _multipliers(linears)
    if linears:
        yield from _stacked_experts(linears, model)


def _types(linears: Iterable[Linear]) -> Iterator[Problem]:
    strange: dict[tuple[bool, str], list[Linear]] = defaultdict(list)
    for linear in linears:
        assert linear.spec is not None
        if linear.spec.scheme not in ENGINE_TYPES[bool(linear.moe)]:
            strange[bool(linear.moe), linear.spec.scheme].append(linear)
    for (routed, scheme), members in strange.items():
        what, others = ("experts", "dense linears") if routed else ("dense linears", "experts")
        yield Problem(
            f"vLLM-Ascend runs {scheme} for {others} only; it will not load {listed(members)}",
            hint=f"for {what} it has {', '.join(sorted(ENGINE_TYPES[routed]))}",
            linear=members[0].info.name,
            fatal=False,
        )


def _groups(linears: Sequence[Linear]) -> Iterator[Problem]:
    for spec, members in by_spec(linears).items():
        if spec.scheme == "W8A16" and spec.weight.scope == "per_group":
            yield Problem(
                f"vLLM-Ascend runs W8A16 with one scale per channel only; it will not load {listed(members)}",
                hint="use scope per_channel for the weight",
                linear=members[0].info.name,
                fatal=False,
            )
        experts = [member for member in members if member.moe]
        if spec.scheme == "W4A16" and spec.weight.scope == "per_channel" and experts:
            yield Problem(
                f"vLLM-Ascend runs W4A16 with groups only; it will not load {listed(experts)}",
                hint="use scope per_group for the weight, with a group_size such as 32 or 128",
                linear=experts[0].info.name,
                fatal=False,
            )


def _float32_static(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.spec is not None and linear.spec.scheme == "W8A8"]
    if members and model.dtype not in ("bfloat16", "float16"):
        yield Problem(
            f"the model is {model.dtype}, and W8A8 stores deq_scale as the engine reads it for float16",
            hint="serve the result with --dtype float16; in bfloat16 its outputs would be wrong",
            linear=members[0].info.name,
            fatal=False,
        )


def _multipliers(linears: Iterable[Linear]) -> Iterator[Problem]:
    members = [linear for linear in linears if linear.info.has_multiplier]
    if members:
        yield Problem(
            f"vLLM-Ascend has no linear whose input is multiplied first; it will not load {listed(members)}",
            hint="take non-fusion out of enable_subgraph_type, unless MindIE is to serve the result",
            linear=members[0].info.name,
            fatal=False,
        )


def _stacked_experts(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
    taken_apart = {linear.moe for linear in linears}  # quantized experts are written one by one
    names = (name for name in model.tensors if name.endswith(_STACKED_EXPERTS))
    stacked = sorted(name for name in names if name.rpartition(".")[0] not in taken_apart)
    if stacked:
        yield Problem(
            f"the experts of a layer are stored as one tensor ({stacked[0]}, and {len(stacked) - 1} more), "
            "and vLLM-Ascend looks for one linear per expert in a quantized model",
            hint="see whether your version of vLLM-Ascend loads this model with its experts in float",
            fatal=False,
        )
