# SPDX-License-Identifier: Apache-2.0
"""The trials of a tune on the disk: one directory each, and a journal from which a killed tune goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelslim.disk import explained, lock
from modelslim.errors import Diagnostic, UsageError
from modelslim.report import digest

JOURNAL = "journal.jsonl"
LOCK = "lock"
VERSION = 1

_WORDS = {
    "tune": "the version of the journal",
    "plan": "the plan",
    "source": "the source model",
    "dataset": "the calibration data",
    "evaluation": "the evaluation",
    "adapter": "the adapter",
    "device": "the device",
    "computer": "the computer",
    "versions": "versions",
}


class Trials:
    """A directory of trials, for one process at a time; a context manager that gives it free.

    Attributes:
        path: the directory.
        records: the finished trials, in their order.

    Args:
        path: the directory; made when missing.
        header: what the tune is; an earlier tune that is another one is refused.
        restart: remove what an earlier tune left.

    Raises:
        UsageError: the directory is that of another tune, in use by one, or none of ours.
        SaveError: it cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, restart: bool) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        check_trials(path)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a", encoding="utf-8")
        try:
            if not lock(self._lock):
                raise UsageError(f"{path} is in use by another tune", hint="wait for it, or choose another --save_path")
            with explained(path):
                if restart:
                    _empty(path)
                self._open(header)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """The finished trial of a protocol, by its digest."""
        return next((record for record in self.records if record["key"] == key), None)

    def directory(self, key: str) -> Path:
        """Where a new trial lies; an unfinished one of the same protocol is continued there."""
        path = self.path / "trials" / f"{len(self.records) + 1:04d}"
        marker = path / "key"
        with explained(path):
            if path.exists() and (not marker.exists() or marker.read_text(encoding="utf-8") != key):
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            marker.write_text(key, encoding="utf-8")
        return path

    def add(self, record: dict[str, Any]) -> None:
        """Write a finished trial down; it counts from now on, whatever happens."""
        with explained(self.path), (self.path / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.records.append(record)

    def _open(self, header: Mapping[str, Any]) -> None:
        """Read the journal of the same tune; half a line of a killed process goes."""
        lines = self._read()
        if lines and lines[0] != header:
            raise _another(self.path, lines[0], header)
        self.records = lines[1:]
        text = "".join(json.dumps(line) + "\n" for line in [header, *self.records])
        # The journal itself is never half there.
        (self.path / "journal.new").write_text(text, encoding="utf-8")
        (self.path / "journal.new").replace(self.path / JOURNAL)

    def _read(self) -> list[dict[str, Any]]:
        file = self.path / JOURNAL
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]


def check_trials(path: Path) -> None:
    """Refuse a place that holds something else than trials.

    Raises:
        UsageError: it does.
    """
    ours = path.is_dir() and ((path / LOCK).is_file() or not any(path.iterdir()))
    if path.exists() and not ours:
        raise UsageError(f"{path} is in the way and holds no trials of a tune", hint="move it away")


def _empty(path: Path) -> None:
    """Remove all but the lock."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def key_of(protocol: Mapping[str, Any]) -> str:
    """A digest of what a protocol says."""
    return digest(protocol)


def _another(path: Path, kept: Mapping[str, Any], header: Mapping[str, Any]) -> UsageError:
    different = [_WORDS.get(key, key) for key in {**kept, **header} if kept.get(key) != header.get(key)]
    return UsageError(
        f"{path} holds the trials of another tune",
        diagnostics=[Diagnostic(f"{what} changed") for what in different],
        hint="--restart begins anew, or choose another --save_path",
    )
