# SPDX-License-Identifier: Apache-2.0
"""The linears of a planned model as engines see them, and what all engines ask of linears that they make one of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelslim.saver import PlannedModel
from modelslim.types import LinearInfo, Problem, QuantSpec, TensorSpec

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj": ("in_proj_qkvz", "in_proj_ba"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Neighbours, by the last part of their names, that engines make one linear of, by the last part of its name."""

_EXPERTS = re.compile(r"(?P<moe>(?:.+\.)?experts)\.\d+\.")


@dataclass(frozen=True)
class PlannedLinear:
    """A linear with its scheme; None leaves it in float."""

    info: LinearInfo
    spec: QuantSpec | None

    @property
    def parent(self) -> str:
        """Its stored name without the last part."""
        return self.info.stored.rpartition(".")[0]

    @property
    def last(self) -> str:
        """The last part of its stored name."""
        return self.info.stored.rpartition(".")[2]

    @property
    def moe(self) -> str:
        """Name of the experts that it is part of; empty for a linear that is no routed expert's."""
        match = _EXPERTS.match(self.info.stored)
        return match["moe"] if match else ""


def planned_linears(model: PlannedModel) -> list[PlannedLinear]:
    """Every linear of the model."""
    return [PlannedLinear(info, model.specs.get(name)) for name, info in model.linears.items()]


def group_by_spec(linears: Iterable[PlannedLinear]) -> dict[QuantSpec, list[PlannedLinear]]:
    """The quantized ones of the linears, by scheme."""
    groups: dict[QuantSpec, list[PlannedLinear]] = defaultdict(list)
    for linear in linears:
        if linear.spec is not None:
            groups[linear.spec].append(linear)
    return groups


def fusions(
    linears: Iterable[PlannedLinear], fused: Mapping[str, Sequence[str]] = FUSED
) -> Iterator[tuple[str, list[PlannedLinear]]]:
    """Parent and members of every fusion that has at least two members."""
    children: dict[str, dict[str, PlannedLinear]] = defaultdict(dict)
    for linear in linears:
        children[linear.parent][linear.last] = linear
    for parent, by_last in children.items():
        for names in fused.values():
            members = [by_last[name] for name in names if name in by_last]
            if len(members) > 1:
                yield parent, members


def listed(linears: Sequence[PlannedLinear]) -> str:
    """The first by its name and the others by their number."""
    first = linears[0].info.name
    return f"{first} and {len(linears) - 1} more" if len(linears) > 1 else first


def joined(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def scheme_in_words(spec: QuantSpec | None) -> str:
    """A linear's scheme in the words of a message, such as ``W8A16 (weight per_group 128)``; None is FLOAT."""
    if spec is None:
        return "FLOAT"
    details = [text for text in (_details("weight", spec.weight), _details("activation", spec.activation)) if text]
    return f"{spec.scheme} ({', '.join(details)})" if details else spec.scheme


def _details(operand: str, spec: TensorSpec) -> str:
    words = [f"{spec.scope} {spec.group_size}"] if spec.scope == "per_group" else []
    if not spec.symmetric:
        words.append("asymmetric")
    return " ".join([operand, *words]) if words else ""


def check_fused(
    linears: Iterable[PlannedLinear], engine: str, fused: Mapping[str, Sequence[str]] = FUSED
) -> Iterator[Problem]:
    """Linears that the engine makes one of and that do not have one scheme.

    Args:
        linears: all linears of the model.
        engine: its name, for the message.
        fused: what it makes one of; as of ``FUSED``.
    """
    # Layers that differ in the same way make one problem: sixty equal lines would hide the others.
    places: dict[tuple[str, ...], list[tuple[str, list[PlannedLinear]]]] = defaultdict(list)
    for parent, members in fusions(linears, fused):
        if not members[0].moe and len({member.spec for member in members}) > 1:
            difference = tuple(f"{member.last} {scheme_in_words(member.spec)}" for member in members)
            places[difference].append((parent, members))
    for difference, groups in places.items():
        parent, members = groups[0]
        where = f"{parent} (and {len(groups) - 1} more)" if len(groups) > 1 else parent
        names = joined([member.last for member in members])
        yield Problem(
            f"{engine} makes one linear of {names}, so their schemes must be equal; in {where}: "
            f"{', '.join(difference)}",
            hint=f"include or exclude {names} together, with one qconfig",
            linear=next(member.info.name for member in members if member.spec is not None),
        )


def check_experts(linears: Iterable[PlannedLinear], engine: str) -> Iterator[Problem]:
    """Routed experts of one layer that do not have one scheme.

    Args:
        linears: all linears of the model.
        engine: its name, for the message.
    """
    layers: dict[str, list[PlannedLinear]] = defaultdict(list)
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
            f"{engine} runs all experts of a layer with one scheme; in {where}: "
            + ", ".join(f"{listed(same)} {scheme_in_words(spec)}" for spec, same in examples.items()),
            hint="include or exclude all linears of all experts of a layer together, with one qconfig",
            linear=next(member.info.name for member in members if member.spec is not None),
        )


def check_tied_head(linears: Iterable[PlannedLinear], model: PlannedModel) -> Iterator[Problem]:
    """A quantized ``lm_head`` whose weight is the token embedding's.

    Args:
        linears: all linears of the model.
        model: the planned model.
    """
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
