# SPDX-License-Identifier: Apache-2.0
"""The directory of a result: ``<save_path>.partial`` until it is whole, then ``<save_path>``.

Each finished unit is a line of its journal, from which the next run continues one that was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from modelslim.disk import explained, lock, sync
from modelslim.errors import ModelSlimError, RankError, SaveError, UsageError
from modelslim.journal import JOURNAL, FinishedStage, FinishedUnit, read_rest, refuse_changes

STATE = "state"
"""Folder for what only a run that continues needs; gone from the result."""
PRIOR = "prior"
"""Folder for what prior stages leave to later ones; gone from the result."""
DEBUG_INFO = "debug_info"
"""Folder for what ``--debug`` keeps."""


class OutputDirectory:
    """``<save_path>.partial`` while the run lasts, ``<save_path>`` once it is whole.

    Leaving the context by an exception removes the partial directory, unless it is to be kept, or units are
    finished and the same command may do better next time: on a full disk, after an interruption or a fault of a
    program or of another rank, not after what is wrong with the model or the data. A killed process leaves it. The
    next run on the same path continues or replaces it.

    Args:
        save_path: the final name.
        header: first line of the journal: what this run is.
        resume: True to continue what an earlier run left; False to replace it.

    Attributes:
        finished: what that run had finished, in order; known once the context is entered.
        stages: the prior stages that it had finished, in order; likewise.
    """

    def __init__(self, save_path: Path, header: Mapping[str, Any], resume: bool = False) -> None:
        self.save_path = save_path.resolve()  # a link keeps its place and its target is made
        self.path = partial_path(self.save_path)
        self._header = header
        self._journal: IO[str] | None = None
        self._kept = False
        self._resume = resume
        self._has_units = False
        self.finished: Sequence[FinishedUnit] = ()
        self.stages: Sequence[FinishedStage] = ()

    def __enter__(self) -> OutputDirectory:
        if self._resume and self._continue():
            return self
        with explained(self.path):
            if self.path.exists():
                _remove(self.path)
            self.path.mkdir(parents=True)
        try:
            with explained(self.path):
                self._journal = (self.path / JOURNAL).open("a", encoding="utf-8")
                lock(self._journal)
            self.journal(self._header)
        except BaseException:
            self._close()
            _remove(self.path)
            raise
        return self

    def _continue(self) -> bool:
        """Take over what another run left, up to the last whole line of its journal; False when that is nothing."""
        file = self.path / JOURNAL
        if not file.is_file():
            return False
        try:
            with explained(self.path):
                self._journal = file.open("a", encoding="utf-8")
                if not lock(self._journal):
                    raise _in_use(self.path)
                rest = read_rest(file)
                if rest is not None:
                    refuse_changes(self.path, rest.header, self._header)
                    os.truncate(file, rest.nbytes)
                    self.finished, self.stages = rest.units, rest.stages
                    self._has_units = True
                    return True
        except BaseException:
            self._close()
            raise
        self._close()
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        may_do_better = isinstance(error, (RankError, SaveError)) or not isinstance(error, ModelSlimError)
        if error is not None and self._has_units and may_do_better:
            self._kept = True
        if self.path.exists() and not self._kept:  # and has not been given its final name
            _remove(self.path)

    @property
    def left(self) -> bool:
        """True when the context is left and another run can continue."""
        return self._kept and self._journal is None and self.path.exists()

    def keep(self) -> None:
        """Leave the partial directory where it is, for people to look at."""
        self._kept = True

    def journal(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the journal, which is locked for as long as the run lives."""
        assert self._journal is not None
        with explained(self.path):
            self._journal.write(json.dumps(entry, separators=(",", ":")) + "\n")
            self._journal.flush()
        self._has_units = self._has_units or "unit" in entry or "stage" in entry

    def _close(self) -> None:
        if self._journal is not None:
            with suppress(OSError):  # a full disk, which flush has told already
                self._journal.close()
            self._journal = None

    def commit(self) -> None:
        """Give the directory its final name."""
        with explained(self.save_path):
            for file in (self.path, *self.path.rglob("*")):
                sync(file)
            self.path.rename(self.save_path)  # onto an empty directory, or onto nothing
            # Not before: by its journal the next run knows the rest of a killed one.
            (self.save_path / JOURNAL).unlink()
            sync(self.save_path.parent)


def partial_path(save_path: Path) -> Path:
    """Where a run for ``save_path`` writes until it is done."""
    return save_path.with_name(f"{save_path.name}.partial")


def check_save_path(save_path: Path, model_path: Path) -> None:
    """Refuse a save path that would overwrite something or touch the source.

    Raises:
        UsageError: it is a file, not empty, or lies inside the model; it cannot be replaced by a directory
            that is renamed; or a ``.partial`` of it is not ours.
    """
    save, model = save_path.resolve(), model_path.resolve()
    if save == model or model in save.parents:
        raise UsageError(
            f"--save_path {save_path} lies inside --model_path {model_path}",
            hint=f"choose another place, such as {_unused(model_path)}",
        )
    if save.exists() and not save.is_dir():
        raise UsageError(f"--save_path {save_path} is a file", hint="choose a directory that does not exist yet")
    if save.exists() and any(save.iterdir()):
        raise UsageError(
            f"--save_path {save_path} is not empty",
            hint=f"choose another directory, such as {_unused(save_path)}, or empty this one",
        )
    if save == Path.cwd() or save.is_mount():
        what = "a mount point" if save.is_mount() else "the current directory"
        raise UsageError(
            f"--save_path {save_path} is {what}, which the finished result cannot replace",
            hint=f"choose a directory inside it, such as {save_path / 'quantized'}",
        )
    partial = partial_path(save)
    if (partial.exists() or partial.is_symlink()) and not _is_rest(partial):
        raise UsageError(f"{partial} is in the way and is not the rest of an earlier run", hint="move it away")
    if partial.exists() and _is_locked(partial / JOURNAL):
        raise _in_use(partial)
    existing = next(parent for parent in save.parents if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"--save_path {save_path}: {existing} is a file", hint="choose another place")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"--save_path {save_path}: {existing} is not writable", hint="choose another place")


def _unused(path: Path) -> Path:
    """A path beside this one that nothing has yet."""
    path = path.resolve() if path.name in ("", "..") else path
    return next(new for number in count(2) if not (new := path.with_name(f"{path.name}_{number}")).exists())


def _is_rest(partial: Path) -> bool:
    """True for what a killed run left: it has a journal, or nothing yet, or nothing any more."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / JOURNAL).is_file() or not any(partial.iterdir())


def _in_use(partial: Path) -> UsageError:
    return UsageError(f"another run is writing {partial}", hint="wait for it, or choose another directory")


def _remove(partial: Path) -> None:
    """Remove a partial directory, its journal last: a run killed meanwhile leaves what the next one knows."""
    if (partial / JOURNAL).is_file():
        os.truncate(partial / JOURNAL, 0)  # what is half removed is nothing to go on from
    remove_all(entry for entry in partial.iterdir() if entry.name != JOURNAL)
    shutil.rmtree(partial)


def remove_all(entries: Iterable[Path]) -> None:
    """Remove files, and directories with what is in them."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def size_of(file: Path) -> int:
    """Bytes of a file; -1 when there is none."""
    return file.stat().st_size if file.is_file() else -1


def check_space(save_path: Path, nbytes: int) -> None:
    """Refuse a run whose result will not fit on the disk; what an earlier run left is continued, or makes room.

    Raises:
        SaveError: says what is needed and what is free.
    """
    existing = next(parent for parent in save_path.resolve().parents if parent.exists())
    rest = partial_path(save_path.resolve())
    free = shutil.disk_usage(existing).free + sum(max(size_of(file), 0) for file in rest.rglob("*"))
    if free < nbytes:
        raise SaveError(
            f"--save_path {save_path}: the result needs {nbytes:,} bytes and {free:,} are free",
            hint="free some space, or save to another disk",
        )


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open(encoding="utf-8") as stream:  # to look is no reason to write
        return not lock(stream)
