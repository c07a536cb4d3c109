# SPDX-License-Identifier: Apache-2.0
"""All stages of a run in turn, on one instance of the model; the next one begins with what the last one made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelslim.journal import FinishedStage
from modelslim.kv_cache import attentions, open_places
from modelslim.loader import Loader
from modelslim.plan import Plan
from modelslim.ranks import Ranks
from modelslim.result import RunOutput
from modelslim.runners.engine import Engine, Held


def run_stages(plan: Plan, writer: RunOutput, ranks: Ranks, *, whole: bool = False) -> list[dict[str, Any]]:
    """Run the prior stages that are not done yet, then the main one.

    Args:
        plan: the plan.
        writer: takes the result; its overlay what prior stages make of the model.
        ranks: who shares the work; all run the same stages.
        whole: hold all units from the start of a stage, instead of one after the other.

    Returns:
        One record per unit of the main stage.
    """
    calibrates = any(stage.samples for stage in plan.stages)
    model = plan.session.init_model(plan.device) if calibrates else plan.model
    if model is not plan.model:
        open_places(model, attentions(plan.planned.caches))
    overlay = writer.overlay
    loader = Loader(model, plan.checkpoint, plan.loader.sources, plan.device, overlay)
    units = [len(stage.info.units) + stage.works_outside for stage in plan.stages]
    main = Held(model, loader, sum(units[:-1]), sum(units), ranks, whole)
    for number, stage in enumerate(plan.prior):
        held = replace(main, started=sum(units[:number]))
        if number < len(overlay.stages):
            _skip(plan, held, overlay.stages[number].records)
            continue
        _run_stage(stage, writer, held)
        loader.release(loader.names())
    return Engine(plan, writer, main).run()


def _run_stage(stage: Plan, writer: RunOutput, held: Held) -> None:
    """Run a prior stage. Every rank computes all of it, and reads what the first one has written."""
    overlay, ranks = writer.overlay, held.ranks
    if not ranks.is_first:
        Engine(stage, writer, held).run()
        overlay.take(FinishedStage.from_data(ranks.share(None)))
        return
    changes = overlay.begin()
    try:
        records = Engine(stage, writer, held, changes).run()
        overlay.finish(changes, records)
    finally:
        changes.abandon()
    ranks.share(overlay.stages[-1].as_data())


def _skip(plan: Plan, held: Held, records: Sequence[Mapping[str, Any]]) -> None:
    """Tell observers of a stage that an earlier run has finished."""
    for index, record in enumerate(records, start=held.started):
        plan.session.unit_started(record["unit"] or "outside the units", index, held.total)
        plan.session.unit_finished(record["unit"], index, held.total, record)
