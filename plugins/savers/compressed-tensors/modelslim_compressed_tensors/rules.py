# SPDX-License-Identifier: Apache-2.0
"""What the format does not allow, or none of its engines; what vLLM does not load is said by its contract."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from modelslim.api import (
    PlannedLinear,
    PlannedModel,
    Problem,
    check_tied_head,
    group_by_spec,
    listed,
    planned_linears,
)
from modelslim_compressed_tensors.caches import check_caches
from modelslim_compressed_tensors.schemes import refusals
from modelslim_compressed_tensors.warn import find_warnings


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems, refusals first."""
    linears = planned_linears(model)
    storable = [linear for linear in linears if linear.spec is not None and not any(refusals(linear.spec))]
    return [
        *_unknown_schemes(linears),
        *_blocks(storable),
        *check_tied_head(linears, model),
        *_added_biases(linears, model),
        *check_caches(model),
        *find_warnings(linears, storable, model),
    ]


def _unknown_schemes(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, members in group_by_spec(linears).items():
        for refusal in refusals(spec):
            yield Problem(
                f"compressed-tensors does not have {refusal.what} ({listed(members)})",
                hint=refusal.hint,
                linear=members[0].info.name,
            )


def _blocks(linears: Iterable[PlannedLinear]) -> Iterator[Problem]:
    for spec, same_spec in group_by_spec(linears).items():
        if spec.weight.group_rows == 1:
            continue
        # Engines read the scale of a smaller block behind the last row, and none behind the last column.
        by_columns: dict[int, list[PlannedLinear]] = defaultdict(list)
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
