# SPDX-License-Identifier: Apache-2.0
"""What the format, or an engine that reads it, does not allow: one function per rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from modelslim.api import PlannedModel, Problem, QuantSpec
from modelslim_compressed_tensors.planned import Linear, by_spec, fusions, joined, listed, planned_linears
from modelslim_compressed_tensors.schemes import describe, refusals
from modelslim_compressed_tensors.warn import find_warnings

ALWAYS_FLOAT: Mapping[str, str] = {
    "eh_proj": "vLLM builds multi-token prediction layers with",
    "indexer.wk": "vLLM builds sparse attention with",
    "indexer.weights_proj": "vLLM builds sparse attention with",
}
"""Linears that the engine holds in float whatever config.json says, by the end of their names, and why."""


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_blocks(storable),
        *_fused(linears),
        *_experts(linears),
        *_always_float(linears),
        *_tied_head(linears, model),
        *_added_biases(linears, model),
        *find_warnings(linears, storable, model),
    ]


def _unknown_schemes(linears: Iterable[Linear]) -> Iterator[Problem]:
    for spec, members in by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"compressed-tensors does not have {refusal.what} ({listed(members)})",
                hint=refusal.hint,
                linear=members[0].info.name,
            )


def _blocks(linears: Iterable[Linear]) -> Iterator[Problem]:
    for spec, same_spec in by_spec(linears).items():
        if spec.weight.group_rows == 1:
            continue
        # Of a smaller block at the end of the rows engines read a scale; at the end of the columns they do not.
        by_columns: dict[int, list[Linear]] = defaultdict(list)
        for linear in same_spec:
            by_columns[linear.info.in_features].append(linear)
        for columns, members in by_columns.items():
            if columns % (spec.weight.group_size or 1):
                yield Problem(
                    f"engines need whole blocks of {spec.weight.group_size} inputs, which {columns} inputs do not give "
                    f"({listed(members)})",
                    hint="exclude them, or use scope per_channel for the weight",
                    linear=members[0].info.name,
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
        names = joined([member.last for member in members])
        yield Problem(
            f"vLLM makes one linear of {names}, so their schemes must be equal; in {where}: {', '.join(difference)}",
            hint=f"include or exclude {names} together, with one qconfig",
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
            f"vLLM runs all experts of a layer with one scheme; in {where}: "
            + ", ".join(f"{listed(same)} {describe(spec)}" for spec, same in examples.items()),
            hint="include or exclude all linears of all experts of a layer together, with one qconfig",
            linear=next(member.info.name for member in members if member.spec is not None),
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
    lost = [linear for linear in linears if linear.info.name in model.added_biases]
    if lost:
        quantized = [linear.info.name for linear in lost if linear.spec is not None]
        yield Problem(
            f"engines pass over a bias that the model was built without; smoothing adds one to {listed(lost)}",
            hint="smooth with symmetric: true",
            linear=quantized[0] if quantized else None,
        )
