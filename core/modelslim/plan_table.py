# SPDX-License-Identifier: Apache-2.0
"""A plan as rows that a person reads and as values that a program reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelslim.memory import in_words
from modelslim.module_sizes import star
from modelslim.plan import Plan
from modelslim.plan_costs import Costs
from modelslim.plan_rows import Row, bits_per_weight, origin, rows, verdicts
from modelslim.runners.work import count_passes


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    weights = rows(plan)
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
        "prior": [
            {
                "entry": origin(plan, plan.protocol.prior[number].path),
                "algorithms": [origin(plan, step.path) for step in stage.steps],
                "dataset": str(stage.dataset) if stage.dataset else None,
                "samples": len(stage.samples),
                "forward_passes": forward_passes(stage),
            }
            for number, stage in enumerate(plan.prior)
        ],
        **sizes(plan),
        "others": others(plan, weights),
        "bits_per_weight": bits_per_weight(weights),
        "engines": verdicts(plan),
        "weights": [asdict(row) for row in weights],
        "costs": plan.costs.as_data(),
        "seconds": round(sum(stage.costs.seconds for stage in plan.stages), 3),
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
        key = (subgraph.type, star(subgraph.source), *dict.fromkeys(map(star, subgraph.targets)))
        grouped[key] = grouped.get(key, 0) + 1
    found = [Place(key[0], key[1], key[2:], count) for key, count in grouped.items()]
    left: dict[tuple[str, str], int] = {}
    for name, why in plan.topology.left_out.items():
        left[star(name), why] = left.get((star(name), why), 0) + 1
    return [*found, *(Place("", name, (), count, why) for (name, why), count in left.items())]


def others(plan: Plan, weights: Sequence[Row]) -> dict[str, int]:
    """Bytes of what is in no row: embeddings, norms, buffers, scales of caches."""
    total = sizes(plan)
    return {key: nbytes - sum(getattr(row, key) for row in weights) for key, nbytes in total.items()}


def forward_passes(plan: Plan) -> int:
    """How often a sample passes a unit at most, in the plan's own stage."""
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
