# SPDX-License-Identifier: Apache-2.0
"""What happened, as records: report.json."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelslim.plan import Plan
from modelslim.saver import TensorRecord

try:
    import resource
except ModuleNotFoundError:  # Windows has no resource module
    resource = None  # type: ignore[assignment]


REPORT = "report.json"


def journal_header(plan: Plan) -> dict[str, Any]:
    """First line of a run's journal: what the run is, so that a later one can tell whether it is the same."""
    return {
        "journal": 1,
        "source": _digest(
            [(t.name, t.dtype, t.shape, t.nbytes, t.file.name) for t in plan.checkpoint.tensors.values()]
        ),
        "protocol": _digest([(step.path, sorted(step.specs)) for step in plan.steps]),
        "dataset": _digest(list(plan.samples)),
        "versions": versions(plan),
    }


def versions(plan: Plan) -> dict[str, str]:
    """Versions of everything that shapes the result."""
    plugins = {entry.distribution: entry.version for entry in plan.registry.entries if entry.status == "ok"}
    return {**plugins, "torch": version("torch"), "python": platform.python_version()}


def make_report(
    plan: Plan, save_path: Path, units: Sequence[dict[str, Any]], records: Sequence[TensorRecord]
) -> dict[str, Any]:
    """The report of a finished run; plain JSON values."""
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
        "bytes_before": before,
        "bytes_after": after,
        "schemes": _schemes(plan, units),
        "tensors": {
            "source": len(plan.checkpoint.tensors),
            "replaced": len(plan.replaced),
            "copied": sum(record.spec is None for record in records),
            "written": len(records),
        },
        "rescaled": sorted(plan.rescaled),
        "left_out": sorted(plan.left_out),
        "peak_memory_bytes": peak_memory(),
        "warnings": list(plan.warnings),
        "versions": versions(plan),
        "units": list(units),
    }


def _schemes(plan: Plan, units: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many linears have which scheme, each expert's counted."""
    fallen = {name: fate["to"] for unit in units for name, fate in unit.get("fell_back", {}).items()}
    return dict(Counter(fallen.get(plan.info.linears[name].module, spec.scheme) for name, spec in plan.specs.items()))


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells begins with the memory of the parent process
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(match[1]) * 1024 if match else None
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
