# SPDX-License-Identifier: Apache-2.0
"""Which schemes the format has: some of those of ascendv1."""

from __future__ import annotations

from collections.abc import Iterator

from modelslim.api import (
    PlannedModel,
    Problem,
    QuantSpec,
    check_tied_head,
    group_by_spec,
    listed,
    planned_linears,
    scheme_in_words,
)
from modelslim_ascendv1.schemes import Refusal
from modelslim_ascendv1.schemes import refusals as refusals_of_ascendv1

TYPES = ("W8A8_DYNAMIC", "W8A8", "W8A8_MXFP8", "W4A4_MXFP4")
"""The type strings, from weak to strong: a model is called after the strongest that it holds."""


def refusals(spec: QuantSpec) -> Iterator[Refusal]:
    """Everything about the scheme that the format does not have; nothing when it can be stored."""
    found = list(refusals_of_ascendv1(spec))
    yield from found
    if not found and spec.scheme not in TYPES:
        yield Refusal(
            scheme_in_words(spec), f"use one of {', '.join(TYPES)}; ascendv1_saver writes more, for other engines"
        )


def find_problems(model: PlannedModel) -> list[Problem]:
    """All problems."""
    linears = planned_linears(model)
    return [*_unknown_schemes(model), *check_tied_head(linears, model)]


def _unknown_schemes(model: PlannedModel) -> Iterator[Problem]:
    for spec, members in group_by_spec(planned_linears(model)).items():
        for refusal in refusals(spec):
            yield Problem(
                f"the format of MindIE-SD has no type for {refusal.what} ({listed(members)})",
                hint=refusal.hint,
                linear=members[0].info.name,
            )
