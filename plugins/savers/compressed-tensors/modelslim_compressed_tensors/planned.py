# SPDX-License-Identifier: Apache-2.0
"""The linears of a planned model as the rules see them: with scheme, neighbours and place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from modelslim.api import LinearInfo, PlannedModel, QuantSpec

FUSED: Sequence[tuple[str, ...]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Neighbours, by the last part of their names, that vLLM makes one linear of."""

_EXPERTS = re.compile(r"(?P<moe>(?:.+\.)?experts)\.\d+\.")


@dataclass(frozen=True)
class Linear:
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


def planned_linears(model: PlannedModel) -> list[Linear]:
    """Every linear of the model."""
    return [Linear(info, model.specs.get(name)) for name, info in model.linears.items()]


def by_spec(linears: Iterable[Linear]) -> dict[QuantSpec, list[Linear]]:
    """The quantized ones of the linears, by scheme."""
    groups: dict[QuantSpec, list[Linear]] = defaultdict(list)
    for linear in linears:
        if linear.spec is not None:
            groups[linear.spec].append(linear)
    return groups


def fusions(linears: Iterable[Linear]) -> Iterator[tuple[str, list[Linear]]]:
    """Parent and members of every fusion that has at least two members."""
    children: dict[str, dict[str, Linear]] = defaultdict(dict)
    for linear in linears:
        children[linear.parent][linear.last] = linear
    for parent, by_last in children.items():
        for names in FUSED:
            members = [by_last[name] for name in names if name in by_last]
            if len(members) > 1:
                yield parent, members


def listed(linears: Sequence[Linear]) -> str:
    """The first by its name and the others by their number."""
    first = linears[0].info.name
    return f"{first} and {len(linears) - 1} more" if len(linears) > 1 else first


def joined(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
