# SPDX-License-Identifier: Apache-2.0
"""The result on disk: streamed safetensors shards in a directory that gets its name when it is whole.

A run writes into ``<save_path>.partial``. A shard's header is reserved as zero bytes and filled when
the shard is closed, so that no loader takes an unfinished shard for a file; memory holds one tensor.
Each finished unit is a line of the journal, from which the next run continues one that was killed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, byte_view
from modelslim.errors import ModelSlimError, RankError, SaveError, UsageError
from modelslim.journal import JOURNAL, FinishedStage, FinishedUnit, Written, read_rest, refuse_changes
from modelslim.saver import TensorRecord
from modelslim.types import QuantSpec, TensorSpec

try:
    import fcntl
except ModuleNotFoundError:  # Windows locks in another way; runs there do not see each other
    fcntl = None  # type: ignore[assignment]

STATE = "state"
"""Folder for what only a run that continues needs; gone from the result."""
PRIOR = "prior"
"""Folder for what prior stages leave to later ones; gone from the result."""
DEBUG_INFO = "debug_info"
"""Folder for what ``--debug`` keeps."""
_ALIGN = 64


class ShardWriter:
    """Appends tensors to ``<stem>-0000i-of-0000N.safetensors``, or to one ``<stem>.safetensors``.

    Args:
        directory: where the files go.
        stem: start of their names.
        max_bytes: a shard is closed before its tensors exceed this; 0 for a single file.
        header_bytes: room for a shard's header. When it is full, the shard is closed too.
        written: called after each tensor with its name and size.
    """

    def __init__(
        self, directory: Path, stem: str, max_bytes: int, header_bytes: int, written: Callable[[str, int], None]
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._max_bytes = max_bytes
        self._room = -(-(header_bytes + 8) // _ALIGN) * _ALIGN - 8
        self._written = written
        self._stream: IO[bytes] | None = None
        self._entries: list[str] = []
        self._header_size = 0
        self._position = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total = 0

    @property
    def progress(self) -> dict[str, int]:
        """Where the next tensor will go: shard number from 0 and byte position behind its header."""
        return {"shard": max(len(self._shards) - 1, 0), "position": self._position}

    def add(self, name: str, dtype: str, shape: Iterable[int], nbytes: int, pieces: Iterable[memoryview]) -> None:
        """Append a tensor.

        Args:
            name: its name.
            dtype: its type in the words of safetensors, such as ``BF16``.
            shape: its shape.
            nbytes: how many bytes the pieces hold together.
            pieces: its bytes, row-major and little-endian.

        Raises:
            SaveError: the disk is full, or writing failed.
        """
        with explained(self._directory):
            if self._stream is not None and self._must_roll(name, dtype, shape, nbytes):
                self._close_shard()
            if self._stream is None:
                self._open_shard()
            assert self._stream is not None
            self._note(name, dtype, shape, nbytes)
            for piece in pieces:
                _write_all(self._stream, piece)
        self._written(name, nbytes)

    def add_tensor(
        self, name: str, tensor: Tensor, spec: QuantSpec | None = None, cache: TensorSpec | None = None
    ) -> Written:
        """Append a tensor from memory.

        Args:
            name: its name.
            tensor: on the CPU.
            spec: scheme of the quantized linear that it belongs to; None for none.
            cache: scheme of the key/value cache that it belongs to; None for none.

        Returns:
            What was written, for the journal and for savers.

        Raises:
            SaveError: the disk is full, or writing failed.
        """
        data = byte_view(tensor.contiguous())
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        self.add(name, dtype, shape, len(data), [data] if len(data) else [])
        return Written(TensorRecord(name, spec, len(data), cache), dtype, shape)

    def restore(self, tensors: Sequence[Written]) -> list[tuple[Path, int]]:
        """Go on behind tensors that an earlier process wrote; what it wrote behind them is cut off.

        Args:
            tensors: those tensors, all of them, in order.

        Returns:
            File and offset of each; files keep these names until ``finish``.

        Raises:
            SaveError: they are not there.
        """
        places: list[tuple[Path, int]] = []
        if not tensors:
            with explained(self._directory):
                _remove_all(entry for entry in self._directory.iterdir() if entry.name not in (JOURNAL, PRIOR))
            return places
        for one in tensors:
            if not self._shards or self._must_roll(one.record.name, one.dtype, one.shape, one.record.nbytes):
                self._begin_shard()
            places.append((self._shard_path(len(self._shards) - 1), 8 + self._room + self._position))
            self._note(one.record.name, one.dtype, one.shape, one.record.nbytes)
        last = len(self._shards) - 1
        with explained(self._directory):
            for number in range(last + 1):
                final = self._directory / self._final_name(number)
                if final.exists():  # it was killed while shards got their names, which was after the last unit
                    final.rename(self._shard_path(number))
            end = 8 + self._room + self._position
            whole = [self._shard_path(number).is_file() for number in range(last)]
            if not all(whole) or _size(self._shard_path(last)) < end:
                raise SaveError(
                    f"{self._directory}: what its journal says is not all there",
                    hint="something else has changed it; --restart begins anew",
                )
            self._stream = self._shard_path(last).open("r+b", buffering=0)
            if any(self._stream.read(8)):  # it has been closed already, with what is cut off now
                self._stream.seek(0)
                _write_all(self._stream, memoryview(bytes(8)))
            self._stream.truncate(end)
            self._stream.seek(end)
            kept = {self._shard_path(number).name for number in range(last + 1)} | {JOURNAL, STATE, PRIOR, DEBUG_INFO}
            _remove_all(entry for entry in self._directory.iterdir() if entry.name not in kept)
        return places

    def sync(self) -> None:
        """Have all that was written on the disk before going on."""
        if self._stream is not None:
            with explained(self._directory):
                os.fsync(self._stream.fileno())

    def finish(self) -> None:
        """Close the last shard, give all shards their names and write the index."""
        with explained(self._directory):
            if self._stream is None:
                self._open_shard()
            self._close_shard()
            weight_map = {}
            for number, names in enumerate(self._shards):
                final = self._final_name(number)
                self._shard_path(number).rename(self._directory / final)
                weight_map.update(dict.fromkeys(names, final))
            if self._max_bytes:
                index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
                write_json(self._directory / f"{self._stem}.safetensors.index.json", index)

    def _note(self, name: str, dtype: str, shape: Iterable[int], nbytes: int) -> None:
        """Enter a tensor at the end of the open shard."""
        if name in self._names:
            raise SaveError(f"{name} would be written twice", hint="the source has a tensor with a name of the format")
        self._names.add(name)
        entry = self._entry(name, dtype, shape, self._position, nbytes)
        self._entries.append(entry)
        self._header_size += len(entry) + 1
        self._position += nbytes
        self._total += nbytes
        self._shards[-1].append(name)

    def _must_roll(self, name: str, dtype: str, shape: Iterable[int], nbytes: int) -> bool:
        if not self._max_bytes:
            return False
        entry = self._entry(name, dtype, shape, self._position, nbytes)
        return self._position + nbytes > self._max_bytes or self._header_size + len(entry) + 2 > self._room

    @staticmethod
    def _entry(name: str, dtype: str, shape: Iterable[int], start: int, nbytes: int) -> str:
        value = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}"

    def _shard_path(self, number: int) -> Path:
        return self._directory / f"{self._stem}-{number + 1:05d}.safetensors.unfinished"

    def _final_name(self, number: int) -> str:
        """The name of a shard when it is certain how many there are."""
        if not self._max_bytes:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _open_shard(self) -> None:
        self._stream = self._shard_path(len(self._shards)).open("wb", buffering=0)
        self._stream.truncate(8 + self._room)
        self._stream.seek(8 + self._room)
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._shards.append([])
        self._entries, self._header_size, self._position = [], 2, 0

    def _close_shard(self) -> None:
        assert self._stream is not None
        header = ("{" + ",".join(self._entries) + "}").encode()
        if len(header) > self._room:
            raise SaveError(
                f"the header of {self._stem} needs {len(header)} bytes and {self._room} were reserved",
                hint="set part_file_size above 0",
            )
        self._stream.seek(0)
        _write_all(self._stream, memoryview(self._room.to_bytes(8, "little") + header.ljust(self._room)))
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None

    def abandon(self) -> None:
        """Close the open file of a run that failed."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


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
    _remove_all(entry for entry in partial.iterdir() if entry.name != JOURNAL)
    shutil.rmtree(partial)


def _remove_all(entries: Iterable[Path]) -> None:
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def check_space(save_path: Path, nbytes: int) -> None:
    """Refuse a run whose result will not fit on the disk; what an earlier run left is continued, or makes room.

    Raises:
        SaveError: says what is needed and what is free.
    """
    existing = next(parent for parent in save_path.resolve().parents if parent.exists())
    rest = partial_path(save_path.resolve())
    free = shutil.disk_usage(existing).free + sum(max(_size(file), 0) for file in rest.rglob("*"))
    if free < nbytes:
        raise SaveError(
            f"--save_path {save_path}: the result needs {nbytes:,} bytes and {free:,} are free",
            hint="free some space, or save to another disk",
        )


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, two spaces deep."""
    with explained(file):
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_all(stream: IO[bytes], piece: memoryview) -> None:
    while piece:
        piece = piece[stream.write(piece) :]


def lock(stream: IO[str]) -> bool:
    """Lock an open file until it is closed, or its process dies; False when another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open(encoding="utf-8") as stream:  # to look is no reason to write
        return not lock(stream)


def sync(path: Path) -> None:
    """Have a file's data, or a directory's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn an OSError into a SaveError that says what to do."""
    try:
        yield
    except OSError as error:
        raise save_error(place, error) from error


def save_error(place: Path, error: OSError) -> SaveError:
    """What an OSError at a place of the result means, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SaveError(
        f"{place}: {'the disk is full' if full else error}",
        hint="free some space and run again" if full else "check the path and its permissions",
    )
