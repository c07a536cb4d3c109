# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: digests of source, data and protocol, versions, computer, command line."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from modelslim.devices import describe_computer
from modelslim.media import content
from modelslim.plan import Plan

WHOLE = 16 << 20
"""Files up to so many bytes are read whole."""
_PLACES, _BLOCK = 16, 1 << 16


def provenance(plan: Plan, distributions: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """Where a result comes from, as JSON values.

    Args:
        plan: the run's plan.
        distributions: the plugins' and the core's distributions, whose requirements are the libraries.
        command: the command line; empty where a program ran it.
    """
    document = plan.protocol.document
    return {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "source": source_files(plan.checkpoint.path),
        "protocol": {"file": document.file, "sha256": sha256(document.text.encode()), "text": document.text},
        "dataset": dataset(plan) if plan.samples else None,
        "libraries": libraries(distributions),
        "computer": {"system": platform.platform(), **describe_computer(plan.device)},
    }


def source_files(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, by name.

    To read all weights would take as long as the run, so of files above ``WHOLE`` bytes the digest is that of their
    size and of 64 KiB at each of 16 evenly spread places; ``sampled`` says so.
    """
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            size = file.stat().st_size
            files[name.as_posix()] = {"bytes": size, "sha256": _file_digest(file, size), "sampled": size > WHOLE}
    return files


def dataset(plan: Plan) -> dict[str, Any]:
    """The calibration data: digest of the samples that were used, and of the file where it is one."""
    samples = json.dumps([content(sample) for sample in plan.samples], sort_keys=True, default=str)
    is_file = plan.dataset is not None and plan.dataset.is_file()
    return {
        "path": str(plan.dataset),
        "samples": len(plan.samples),
        "samples_sha256": sha256(samples.encode()),
        "sha256": sha256(plan.dataset.read_bytes()) if is_file and plan.dataset is not None else None,
    }


def libraries(distributions: Sequence[str]) -> dict[str, str]:
    """Versions of what distributions require and what is installed, extras left out."""
    found = {}
    for distribution in distributions:
        for requirement in _requirements(distribution):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name not in distributions and (installed := _version(name)):
                found[name] = installed
    return dict(sorted(found.items()))


@cache  # what is imported does not change while a process runs, and a program may make many results
def _requirements(distribution: str) -> list[Requirement]:
    """What a distribution requires here; none of python itself."""
    try:
        wanted = [Requirement(text) for text in requires(distribution) or []]
    except (PackageNotFoundError, InvalidRequirement):  # pip's matter, not ours
        return []
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


@cache
def _version(distribution: str) -> str:
    """Its version; empty when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _file_digest(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            digest.update(f"{size};".encode())
            for number in range(_PLACES):
                stream.seek((size - _BLOCK) * number // (_PLACES - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
