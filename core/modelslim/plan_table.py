# SPDX-License-Identifier: Apache-2.0
"""A plan as rows that a person reads and as values that a program reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modelslim.memory import in_words
from modelslim.plan import Plan
from modelslim.plan_costs import Costs
from modelslim.protocol.document import format_path
from modelslim.runners.work import count_passes

_WHY_KEPT = {
    "router": "a router; engines have no quantized ones",
    "stacked experts": "experts that the adapter cannot take apart",
    "no linear": "not a linear module; copied as it is",
}


@dataclass(frozen=True)
class Row:
    """Linears, or other weights, that share a name pattern and a fate.

    Attributes:
        pattern: their name with layer numbers as ``*``.
        count: how many there are.
        shape: shape of the weight.
        scheme: what they become, ``FLOAT`` when nothing.
        why: the entry of the protocol that says so, with its line, or why they stay float.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    scheme: str
    why: str


def rows(plan: Plan) -> list[Row]:
    """The plan's weights, grouped, in the model's order."""
    origin = {name: _origin(plan, step.path) for step in plan.steps for name in step.specs}
    single: list[Row] = []
    for name, linear in plan.info.linears.items():
        spec = plan.specs.get(name)
        outside = "outside the layers; name it outright to quantize it" if not linear.unit else "no entry selects it"
        why = outside if spec is None else origin[name]
        shape = (linear.out_features, linear.in_features)
        single.append(Row(_pattern(name), 1, shape, spec.scheme if spec else "FLOAT", why))
    for name, kept in plan.info.kept.items():
        single.append(Row(_pattern(name), 1, kept.shape, "FLOAT", _WHY_KEPT[kept.why]))
    grouped: dict[tuple[Any, ...], Row] = {}
    for row in single:
        key = (row.pattern, row.shape, row.scheme, row.why)
        known = grouped.get(key)
        grouped[key] = row if known is None else Row(row.pattern, known.count + 1, row.shape, row.scheme, row.why)
    return list(grouped.values())


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {
        "model_path": str(plan.checkpoint.path),
        "adapter": plan.adapter,
        "device": plan.device,
        "runner": plan.runner,
        "engine": plan.target.contract.name if plan.target else None,
        "practice": plan.practice.as_data() if plan.practice else None,
        "units": len(plan.info.units),
        "dataset": str(plan.dataset) if plan.dataset else None,
        "samples": len(plan.samples),
        "calib_length": plan.calib_length,
        "forward_passes": forward_passes(plan),
        **sizes(plan),
        "weights": [asdict(row) for row in rows(plan)],
        "costs": plan.costs.as_data(),
        "smoothing": [asdict(place) for place in places(plan)],
        "warnings": list(plan.warnings),
    }


@dataclass(frozen=True)
class Place:
    """Subgraphs of one kind that smoothing may rescale, or modules that have none.

    Attributes:
        type: kind of the subgraphs; empty for what is left out.
        source: what is divided, with layer numbers as ``*``; for what is left out, its name.
        targets: what is multiplied.
        count: how many there are.
        why: why there is none; empty for subgraphs.
    """

    type: str
    source: str
    targets: tuple[str, ...]
    count: int
    why: str = ""


def places(plan: Plan) -> list[Place]:
    """What smoothing may rescale, as the adapter says, and what it leaves out; empty when no algorithm asks."""
    if plan.topology is None:
        return []
    grouped: dict[tuple[str, ...], int] = {}
    for subgraph in plan.topology.subgraphs:
        key = (subgraph.type, _pattern(subgraph.source), *dict.fromkeys(map(_pattern, subgraph.targets)))
        grouped[key] = grouped.get(key, 0) + 1
    found = [Place(key[0], key[1], key[2:], count) for key, count in grouped.items()]
    left: dict[tuple[str, str], int] = {}
    for name, why in plan.topology.left_out.items():
        left[_pattern(name), why] = left.get((_pattern(name), why), 0) + 1
    return [*found, *(Place("", name, (), count, why) for (name, why), count in left.items())]


def forward_passes(plan: Plan) -> int:
    """How often a sample passes a unit at most."""
    return max((count_passes(plan, unit) for unit in plan.info.units), default=0) if plan.samples else 0


def sizes(plan: Plan) -> dict[str, int]:
    """Bytes of all tensors before and after."""
    before = sum(stored.nbytes for stored in plan.checkpoint.stored.values())
    return {"bytes_before": before, "bytes_after": sum(plan.result_sizes().values())}


def phase_rows(costs: Costs) -> list[tuple[str, ...]]:
    """What each phase holds and takes, for people."""
    return [
        (
            phase.name,
            in_words(phase.host_bytes),
            ", ".join(f"{name} {in_words(nbytes)}" for name, nbytes in _largest(phase.host or phase.device)),
            in_words(phase.device_bytes) if phase.device else "",
            in_time(phase.seconds),
            in_words(phase.read),
            in_words(phase.written),
        )
        for phase in costs.phases
    ]


def in_time(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _largest(parts: Mapping[str, int], count: int = 2) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda one: -one[1])[:count]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _origin(plan: Plan, path: Iterable[str | int]) -> str:
    place = tuple(path)
    line, _ = plan.protocol.document.position(place)
    return f"{format_path(place)}, line {line}"
