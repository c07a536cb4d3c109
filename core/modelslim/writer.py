# SPDX-License-Identifier: Apache-2.0
"""Streamed safetensors shards.

A shard's header is reserved as zero bytes and filled when the shard is closed, so that no loader takes an
unfinished shard for a file; memory holds one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, byte_view
from modelslim.disk import explained, write_json
from modelslim.errors import SaveError
from modelslim.journal import JOURNAL, Written
from modelslim.output_directory import DEBUG_INFO, PRIOR, STATE, remove_all, size_of
from modelslim.saver import TensorRecord
from modelslim.types import QuantSpec, TensorSpec

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
                remove_all(entry for entry in self._directory.iterdir() if entry.name not in (JOURNAL, PRIOR))
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
            if not all(whole) or size_of(self._shard_path(last)) < end:
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
            remove_all(entry for entry in self._directory.iterdir() if entry.name not in kept)
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


def _write_all(stream: IO[bytes], piece: memoryview) -> None:
    while piece:
        piece = piece[stream.write(piece) :]
