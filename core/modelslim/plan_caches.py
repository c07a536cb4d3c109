# SPDX-License-Identifier: Apache-2.0
"""Which key/value caches a run quantizes: asked of the adapter only when an algorithm wants some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modelslim.errors import nearest
from modelslim.kv_cache import find_places
from modelslim.model_info import ModelInfo
from modelslim.patterns import matches_name
from modelslim.plan_checks import Checks, Step
from modelslim.protocol.document import format_path
from modelslim.saver import Saver
from modelslim.session import Session
from modelslim.types import CacheInfo, TensorSpec

if TYPE_CHECKING:
    from torch import nn

HOOK = "get_kv_caches"


def with_caches(
    steps: Sequence[Step], session: Session, model: nn.Module, info: ModelInfo, checks: Checks
) -> tuple[list[Step], Mapping[str, CacheInfo]]:
    """The steps with the caches that each quantizes, and these caches by name.

    A step whose hook is missing is left as it is: the plan refuses it for that.
    """
    wanting = [step for step in steps if step.algorithm.takes_caches]
    if not wanting or not session.has(HOOK):
        return list(steps), {}
    known = find_places(session.get_kv_caches(model), info)
    taken: dict[str, Step] = {}
    result = []
    for step in steps:
        chosen = dict(step.algorithm.select_caches(known)) if step in wanting else {}
        _check_patterns(step if step in wanting else None, known, checks)
        if step in wanting and not known:
            checks.refuse(
                step.path,
                "no attention of this model keeps keys and values head by head, made by a k_proj and a v_proj",
                "leave this entry out",
            )
        elif step in wanting and not chosen:
            checks.refuse(step.path, "selects no cache: nothing would be quantized", "check include and exclude")
        twice = next((name for name in chosen if name in taken), None)
        if twice is not None:
            checks.refuse(
                step.path,
                f"quantizes {twice}, which {format_path(taken[twice].path)} quantizes already",
                "exclude it from one of the two",
            )
        taken.update(dict.fromkeys(chosen, step))
        result.append(replace(step, caches=chosen))
    return result, {one.name: one for one in known if one.name in taken}


def with_held_cache_scales(steps: Sequence[Step], saver: Saver, model_dtype: str) -> list[Step]:
    """The steps with cache scales of the dtype in which the engine holds them."""
    held = saver.cache_scale_dtype(model_dtype)
    return [
        replace(step, caches={name: replace(spec, scale_dtype=held) for name, spec in step.caches.items()})
        for step in steps
    ]


def check_stored(steps: Sequence[Step], saver: Saver, checks: Checks) -> None:
    """Refuse caches for which the format has no place."""
    for step in steps:
        if step.caches and not saver.stores_caches:
            checks.refuse(
                step.path, "quantizes key/value caches, which the format has no place for", "write another format"
            )


def cache_specs(steps: Iterable[Step]) -> dict[str, TensorSpec]:
    """What every quantized cache becomes, by name."""
    return {name: spec for step in steps for name, spec in step.caches.items()}


def _check_patterns(step: Step | None, known: Sequence[CacheInfo], checks: Checks) -> None:
    names = list(dict.fromkeys(one.attention for one in known))
    for place, pattern in step.algorithm.patterns() if step and names else ():
        if not any(matches_name(name, pattern) for name in names):
            checks.refuse(
                (*step.path, *place) if step else place,
                f"the pattern {pattern!r} matches no attention that keeps keys and values in a cache",
                nearest(pattern, names) or f"such as {names[0]}",
            )
