# SPDX-License-Identifier: Apache-2.0
"""What happened, as records: report.json."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelslim.devices import describe_computer
from modelslim.journal import VERSION
from modelslim.media import content
from modelslim.memory import Meter, resident_memory
from modelslim.module_sizes import module_sizes
from modelslim.plan import Plan
from modelslim.protocol.document import format_path
from modelslim.provenance import provenance
from modelslim.saver import TensorRecord

try:
    import resource
except ModuleNotFoundError:  # Windows has no resource module
    resource = None  # type: ignore[assignment]


REPORT = "report.json"


def journal_header(plan: Plan) -> dict[str, Any]:
    """First line of a run's journal: all that shapes the result, so that a later run can tell whether it is the same.

    Of the weights not the content counts, which would take as long to read as the run takes, but size and time of
    change of their files.
    """
    path = plan.checkpoint.path
    names = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    files = [
        (str(name), (path / name).stat())
        for name in names
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    ]
    return {
        "journal": VERSION,
        "source": digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]),
        "protocol": digest(plan.protocol.document.value),
        "dataset": digest([[content(sample) for sample in stage.samples] for stage in plan.stages]),
        "calib_length": plan.calib_length,
        "adapter": plan.adapter,
        "device": plan.device,
        "computer": describe_computer(plan.device),
        "versions": versions(plan),
    }


def versions(plan: Plan) -> dict[str, str]:
    """Versions of everything that shapes the result."""
    plugins = {entry.distribution: entry.version for entry in plan.registry.entries if entry.status == "ok"}
    return {**plugins, "torch": version("torch"), "python": platform.python_version()}


def make_report(
    plan: Plan,
    save_path: Path,
    units: Sequence[Mapping[str, Any]],
    records: Sequence[TensorRecord],
    meter: Meter,
    prior: Sequence[Sequence[Mapping[str, Any]]] = (),
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of a finished run; plain JSON values.

    Args:
        plan: its plan.
        save_path: where the result goes.
        units: the records of the main stage's units.
        records: what was written.
        meter: has measured the run's memory.
        prior: the records of each prior stage's units.
        command: the command line; empty where a program ran it.
    """
    fates = _fates(plan, [*(unit for stage in prior for unit in stage), *units])
    before = sum(stored.nbytes for stored in plan.checkpoint.stored.values())
    after = sum(record.nbytes for record in records)
    return {
        "report": 1,
        "model_path": str(plan.checkpoint.path),
        "save_path": str(save_path),
        "adapter": plan.adapter,
        "device": plan.device,
        "runner": plan.runner,
        "dataset": str(plan.dataset) if plan.dataset else None,
        "samples": len(plan.samples),
        "calib_length": plan.calib_length,
        "practice": plan.practice.as_data() if plan.practice else None,
        "bytes_before": before,
        "bytes_after": after,
        "schemes": dict(Counter(fates.values())),
        "modules": module_sizes(
            {name: stored.nbytes for name, stored in plan.checkpoint.stored.items()},
            {record.name: record.nbytes for record in records},
            ((plan.info.linears[name].stored, scheme) for name, scheme in fates.items() if scheme != "FLOAT"),
        ),
        "tensors": {
            "source": len(plan.checkpoint.tensors),
            "replaced": len(plan.replaced),
            "copied": sum(record.spec is None for record in records),
            "written": len(records),
        },
        "rescaled": sorted(plan.rescaled),
        "left_out": sorted(plan.left_out),
        "peak_memory_bytes": peak_memory(),
        "memory": memory_record(plan, meter),
        "warnings": list(plan.warnings),
        "versions": versions(plan),
        "prior": [
            {
                "entry": format_path(plan.protocol.prior[number].path),
                "dataset": str(stage.dataset) if stage.dataset else None,
                "samples": len(stage.samples),
                "units": list(done),
            }
            for number, (stage, done) in enumerate(zip(plan.prior, prior, strict=True))
        ],
        "provenance": provenance(plan, list(versions(plan)), command),
        "kl": kl_record(plan, units),
        "units": [{key: value for key, value in unit.items() if key != "kl"} for unit in units],
    }


def kl_record(plan: Plan, units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """KL per layer, which the last unit that samples pass has in its record, or why there is none."""
    found = next((unit["kl"] for unit in units if "kl" in unit), None)
    if found is not None:
        return dict(found)
    note = "the runner has not measured it" if plan.samples else "nothing was calibrated, so no text passed the model"
    return {"texts": 0, "tokens": 0, "positions": 0, "units": {}, "notes": [note]}


def memory_record(plan: Plan, meter: Meter) -> dict[str, Any]:
    """What the run has held by now beyond the program itself, beside what was expected and allowed, by place."""
    costs = plan.costs
    budget = {"host": plan.budget.host, **plan.budget.devices}
    return {
        "peak_bytes": meter.peaks(),
        "estimated_bytes": costs.peaks,
        "budget_bytes": {place: nbytes for place, nbytes in budget.items() if nbytes is not None},
        "activations": costs.layout.activations if plan.samples else None,
        "reads_ahead": costs.layout.ahead,
        "estimated_seconds": round(costs.seconds, 3),
    }


def _fates(plan: Plan, units: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What every linear that was to be quantized became, each expert's counted."""
    fallen = {name: fate["to"] for unit in units for name, fate in unit.get("fell_back", {}).items()}
    return {name: fallen.get(plan.info.linears[name].module, spec.scheme) for name, spec in plan.specs.items()}


class Phases:
    """Seconds of the phases of a run, and the largest memory up to the end of each."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.done: list[dict[str, Any]] = []

    def end(self, phase: str, seconds: float | None = None) -> None:
        """A phase ends; it began when the last one ended, unless its seconds are known."""
        now = time.perf_counter()
        took = now - self._last if seconds is None else seconds
        self._last = now
        self.done.append({"phase": phase, "seconds": round(took, 3), "peak_memory_bytes": peak_memory()})


def peak_memory() -> int | None:
    """Largest resident set of this process since the run began, imports included; None where nobody tells."""
    highest = resident_memory("VmHWM")
    if highest is not None:  # what getrusage tells begins with the memory of the parent process
        return highest
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def digest(value: Any) -> str:
    """SHA-256 of JSON values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
