# SPDX-License-Identifier: Apache-2.0
"""What the format, or vLLM-Ascend which reads it, does not allow: one function per rule."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from modelslim.api import PlannedModel, Problem, QuantSpec
from modelslim_ascendv1.caches import check_caches
from modelslim_ascendv1.layout import TP_SLICES, is_row_parallel
from modelslim_ascendv1.planned import Linear, by_spec, fusions, joined, listed, planned_linears
from modelslim_ascendv1.schemes import describe, refusals
from modelslim_ascendv1.warn import find_warnings

ALWAYS_FLOAT: Mapping[str, str] = {
    "kv_b_proj": "multi-head latent attention needs",
    "eh_proj": "vLLM-Ascend builds multi-token prediction layers with",
    "indexer.weights_proj": "vLLM-Ascend builds sparse attention with",
}
"""Linears that the engine holds in float whatever the description says, by the end of their names, and why."""


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_shapes(storable),
        *_fused(linears),
        *_experts(linears),
        *_group_size(storable),
        *_always_float(linears),
        *_tied_head(linears, model),
        *_added_biases(linears, model),
        *_prefixes(linears, model),
        *check_caches(model),
        *find_warnings(storable, model),
    ]


def _unknown_schemes(linears: Iterable[Linear]) -> Iterator[Problem]:
    for spec, members in by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"ascendv1 has no type for {refusal.what} ({listed(members)})",
                hint=refusal.hint,
                linear=members[0].info.name,
            )


def _shapes(linears: Iterable[Linear]) -> Iterator[Problem]:
    for spec, same_spec in by_spec(linears).items():
        by_columns: dict[int, list[Linear]] = defaultdict(list)
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


def _fused(linears: Iterable[Linear]) -> Iterator[Problem]:
    # Layers that differ in the same way make one problem: sixty equal lines would hide the others.
    places: dict[tuple[str, ...], list[tuple[str, list[Linear]]]] = defaultdict(list)
    for parent, members in fusions(linears):
        if not members[0].moe and len({member.spec for member in members}) > 1:
            difference = tuple(f"{member.last} {describe(member.spec)}" for member in members)
            places[difference].append((parent, members))
    for difference, groups in places.items():
        parent, members = groups[0]
        where = f"{parent} (and {len(groups) - 1} more)" if len(groups) > 1 else parent
        yield Problem(
            f"vLLM-Ascend makes one linear of {joined([member.last for member in members])}, so their schemes must "
            f"be equal; in {where}: {', '.join(difference)}",
            hint=f"include or exclude {joined([member.last for member in members])} together, with one qconfig",
            linear=next(member.info.name for member in members if member.spec is not None),
        )


def _experts(linears: Iterable[Linear]) -> Iterator[Problem]:
    layers: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        if linear.moe:
            layers[linear.moe].append(linear)
    mixed: dict[tuple[QuantSpec | None, ...], list[str]] = defaultdict(list)
    for name, members in layers.items():
        specs = tuple({member.spec: None for member in members})
        if len(specs) > 1:
            mixed[specs].append(name)
    for specs, names in mixed.items():
        members = layers[names[0]]
        examples = {spec: [member for member in members if member.spec == spec] for spec in specs}
        where = f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]
        yield Problem(
            f"vLLM-Ascend runs all experts of a layer with one scheme; in {where}: "
            + ", ".join(f"{listed(same)} {describe(spec)}" for spec, same in examples.items()),
            hint="include or exclude all linears of all experts of a layer together, with one qconfig",
            linear=next(member.info.name for member in members if member.spec is not None),
        )


def _group_size(linears: Iterable[Linear]) -> Iterator[Problem]:
    sizes: dict[int, Linear] = {}
    packed: Linear | None = None
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
            f"{describe(grouped.spec)} ({grouped.info.name}) needs {size}",
            hint="use scope per_channel for the weights of the latter, or one scheme for both",
            linear=grouped.info.name,
        )


def _always_float(linears: Sequence[Linear]) -> Iterator[Problem]:
    for name, reason in ALWAYS_FLOAT.items():
        members = [
            linear for linear in linears if f".{linear.info.stored}".endswith(f".{name}") and linear.spec is not None
        ]
        if members:
            yield Problem(
                f"{reason} {name} in float ({listed(members)})",
                hint=f'add "*.{name}" to exclude',
                linear=members[0].info.name,
            )


def _tied_head(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
    text = model.config.get("text_config")
    configs = (model.config, text if isinstance(text, Mapping) else {})
    says_tied = any(config.get("tie_word_embeddings") is True for config in configs)
    for linear in linears:
        if linear.spec is None or linear.info.name.rpartition(".")[2] != "lm_head":
            continue
        # A head that is stored nowhere, or under the name of the embedding, is tied whatever config.json says.
        own = linear.last == "lm_head" and f"{linear.info.stored}.weight" in model.tensors
        if says_tied or not own:
            yield Problem(
                f"{linear.info.name} shares its weight with the token embedding, which stays in float",
                hint='take "lm_head" out of include; a quantized copy would be ignored',
                linear=linear.info.name,
            )


def _added_biases(linears: Iterable[Linear], model: PlannedModel) -> Iterator[Problem]:
    """A bias that the architecture does not have reaches the engine inside ``quant_bias`` only."""
    lost = [
        linear
        for linear in linears
        if linear.info.name in model.added_biases and (linear.spec is None or linear.spec.scheme != "W8A8")
    ]
    if lost:
        quantized = [linear.info.name for linear in lost if linear.spec is not None]
        yield Problem(
            f"vLLM-Ascend passes over a bias that the model was built without, unless the scheme is W8A8 with static "
            f"activations; smoothing adds one to {listed(lost)}",
            hint="smooth with symmetric: true, or quantize these linears with per_tensor activations",
            linear=quantized[0] if quantized else None,
        )


def _prefixes(linears: Sequence[Linear], model: PlannedModel) -> Iterator[Problem]:
    # The engine leaves a linear in float if any FLOAT `.weight` key begins with its name. Fused linears and
    # experts are looked up by their exact keys instead.
    exact = {member.info.stored for _, members in fusions(linears) for member in members}
    quantized = [linear for linear in linears if linear.spec is not None]
    names = {name for name in model.tensors if name.endswith(".weight")}
    names.update(f"{linear.info.stored}.weight" for linear in linears if linear.spec is None)
    floats = sorted(names - {f"{linear.info.stored}.weight" for linear in quantized})
    places: dict[tuple[str, str], list[Linear]] = defaultdict(list)
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
