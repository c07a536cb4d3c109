# SPDX-License-Identifier: Apache-2.0
"""Takes the memory of activations away while their sample waits, and gives it back, unchanged, before it goes on.

A suspended forward holds its tensors in its own frames, which nobody can empty. So the tensors themselves stay, without
memory, and are set on it again when their sample is woken. This is done only where every tensor that shares the memory
is known. The bytes wait on the host, or in a file that has no name and so survives nothing. The file is read and
written, not mapped: mapped pages would count as memory of the process, and a full disk would kill it instead of raising
an error.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn

from modelslim.checkpoint import byte_view
from modelslim.costs import Layout
from modelslim.devices import is_host
from modelslim.disk import explained
from modelslim.errors import SaveError
from modelslim.memory import Trimmer
from modelslim.transfers import Arrival, Departure, bring_back, departure

BYTES = "bytes"
"""The name under which a storage arrives."""
_LEAST = 1 << 12  # smaller tensors weigh less than the work on them
_ASLEEP = (0, 65521)  # a shape that goes together with no other, so that whoever touches a sleeping tensor is told


class Spill:
    """The activations of all samples that wait, of one stream or several over the same model.

    The sample that slept last keeps its memory until the next one does: what both hold is no sample's own, such as a
    table that the model keeps, and never sleeps.

    Args:
        store: where the bytes wait.
        model: its buffers never sleep.
        inputs: of the model, which never sleep either.
    """

    def __init__(self, store: Store, model: nn.Module, inputs: Any) -> None:
        self._store = store
        # Weakly: another storage may take the place of one that died.
        self._kept: dict[int, weakref.ref[Tensor]] = {}
        for one in (*(buffer for buffer in model.buffers() if not buffer.is_meta), *_tensors(inputs)):
            self._kept[_identity(one)] = weakref.ref(one)
        self._entries: dict[Hashable, list[_Entry]] = {}
        self._sleeping: dict[int, _Entry] = {}
        self._last: Hashable = None
        self._woken: Hashable = None
        self._next: dict[Hashable, Hashable] = {}
        self._trimmer = Trimmer(is_scarce=True)

    def sleep(self, key: Hashable, value: Any) -> None:
        """Let a sample wait: its tensors must not be touched until it is woken.

        Args:
            key: stands for the sample.
            value: what it waits with: tensors in tuples, lists, mappings and dataclasses. What it waited with before
                and is still held somewhere sleeps, too.
        """
        found = {id(one): one for one in _tensors(value)}
        for identity in found:
            if identity in self._sleeping:  # passed on by another sample's forward, unread
                self._keep(self._sleeping[identity])
        old = (reference() for entry in self._entries.pop(key, ()) for reference in entry.references)
        found |= {id(one): one for one in old if one is not None}
        storages: dict[int, list[Tensor]] = defaultdict(list)
        for one in found.values():
            storages[_identity(one)].append(one)
        self._entries[key] = [
            _Entry(identity, [weakref.ref(one) for one in tensors])
            for identity, tensors in storages.items()
            if not self._is_kept(identity) and tensors[0].untyped_storage().nbytes() >= _LEAST
        ]
        before, self._last = self._last, key
        if before is not None and before != key and before in self._entries:
            for identity in storages.keys() & {entry.identity for entry in self._entries[before]}:
                self._kept[identity] = weakref.ref(storages[identity][0])
            for each in (before, key):
                self._entries[each] = [entry for entry in self._entries[each] if not self._is_kept(entry.identity)]
            for entry in self._entries[before]:
                self._empty(entry)
            self._store.catch_up()
            self._trimmer.look()

    def wake(self, key: Hashable) -> None:
        """Give a sample its tensors back, and begin to bring back those of the sample that followed it last time."""
        for entry in self._entries.get(key, ()):
            if entry.tensors:
                self._fill(entry)
        if self._store.ahead:
            self._expect_after(key)

    def close(self) -> None:
        """Forget all; what sleeps is lost."""
        self._entries.clear()
        self._sleeping.clear()
        self._store.close()

    def _expect_after(self, key: Hashable) -> None:
        """Samples pass every unit in one order, so fetch the one that followed this one last time."""
        before, self._woken = self._woken, key
        expected = self._next.get(before)
        if expected != key:  # it is not waited for any more
            for entry in self._entries.get(expected, ()):
                entry.coming = None
            self._next[before] = key
        for entry in self._entries.get(self._next.get(key), ()):
            if entry.tensors:
                entry.coming = self._store.fetch(entry.place)

    def _is_kept(self, identity: int) -> bool:
        reference = self._kept.get(identity)
        return reference is not None and reference() is not None

    def _keep(self, entry: _Entry) -> None:
        """Wake what is not one sample's own, for good."""
        if entry.tensors:
            kept = entry.tensors[0][0]
            self._fill(entry)
            self._kept[entry.identity] = weakref.ref(kept)
            entry.references.clear()

    def _empty(self, entry: _Entry) -> None:
        tensors = [tensor for tensor in (reference() for reference in entry.references) if tensor is not None]
        if not tensors or entry.tensors:
            return
        storage = tensors[0].untyped_storage()
        if _users(storage) != len(tensors):
            return  # somebody else looks at this memory
        entry.place = self._store.write(_bytes_of(storage))
        entry.tensors = [(one, int(one.storage_offset()), tuple(one.shape), one.stride()) for one in tensors]
        del storage
        for one in tensors:
            nothing = torch.empty(0, device=one.device)
            one.set_(nothing.untyped_storage(), 0, _ASLEEP, (1, 1))
            self._sleeping[id(one)] = entry

    def _fill(self, entry: _Entry) -> None:
        arrival = self._store.fetch(entry.place) if entry.coming is None else entry.coming
        entry.coming = None
        data = arrival.take()[BYTES]
        self._store.free(entry.place)
        storage = data.untyped_storage()
        for tensor, offset, shape, stride in entry.tensors:
            tensor.set_(storage, offset, shape, stride)
            del self._sleeping[id(tensor)]
        entry.identity = int(storage._cdata)
        entry.tensors = []


@dataclass
class _Entry:
    """A storage.

    Attributes:
        identity: of the storage, as long as it lives.
        references: the tensors on it, which may die while the sample is awake.
        tensors: the same while they sleep, with offset, shape and stride.
        place: where its bytes are.
        coming: the same on their way back; None before they are fetched.
    """

    identity: int
    references: list[weakref.ref[Tensor]]
    tensors: list[tuple[Tensor, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    place: Any = None
    coming: Arrival | None = None


class Store(Protocol):
    """Where bytes wait.

    Attributes:
        ahead: True where to fetch before it is needed saves time.
    """

    ahead: bool

    def write(self, data: Tensor) -> Any:
        """Keep the bytes, uint8 [n] on the device; returns what finds them again. They may be freed at once."""

    def fetch(self, place: Any) -> Arrival:
        """Begin to bring back what was kept, to new memory of the device; uint8 [n] under the name ``BYTES``."""

    def free(self, place: Any) -> None:
        """The bytes are not wanted any more."""

    def catch_up(self) -> None:
        """Called behind each sample that was written; may wait for those before."""

    def close(self) -> None:
        """Nothing is wanted any more."""


class HostStore:
    """Keeps bytes in the computer's memory, pinned where they come from an accelerator, so that copies need no wait.

    Args:
        device: the torch device from which they come.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.ahead = not is_host(device)
        self._leaving = self._before = Departure()

    def write(self, data: Tensor) -> tuple[Tensor, Departure]:
        """See :class:`Store`."""
        with departure(self._device) as leaving:
            kept = leaving.bring(data)
        self._leaving = leaving
        return data.clone() if kept is data else kept, leaving

    def fetch(self, place: tuple[Tensor, Departure]) -> Arrival:
        """See :class:`Store`."""
        return bring_back(BYTES, *place, self._device)

    def free(self, place: tuple[Tensor, Departure]) -> None:
        """Its memory goes with the last reference, behind the copies that are under way."""

    def catch_up(self) -> None:
        """Wait for the sample before the last one, lest samples leave more slowly than they are computed.

        The device has the last one to compute meanwhile.
        """
        self._before.wait()
        self._before = self._leaving

    def close(self) -> None:
        """Nothing is held here."""


class FileStore:
    """Keeps bytes in a file without a name.

    Args:
        folder: on the disk that is to hold them.
        device: the torch device from which they come.
    """

    ahead = False

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        self._folder = folder
        with explained(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (until close)
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0

    def write(self, data: Tensor) -> tuple[int, int]:
        """See :class:`Store`."""
        view = byte_view(data.cpu())
        size = len(view)
        free = self._free[size]
        start = free.pop() if free else self._end
        self._end = max(self._end, start + size)
        done = 0
        with explained(self._folder):
            while done < size:
                done += os.pwrite(self._file.fileno(), view[done:], start + done)
        return start, size

    def fetch(self, place: tuple[int, int]) -> Arrival:
        """See :class:`Store`."""
        start, size = place
        host = torch.empty(size, dtype=torch.uint8)
        view, done = byte_view(host), 0
        with explained(self._folder):
            while done < size:
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
                if not count:
                    raise SaveError(f"{self._folder}: activations that were put there are gone")
                done += count
        return Arrival({BYTES: host.to(self._device)})

    def free(self, place: tuple[int, int]) -> None:
        """See :class:`Store`."""
        start, size = place
        self._free[size].append(start)

    def catch_up(self) -> None:
        """What was written is in the file."""

    def close(self) -> None:
        """See :class:`Store`."""
        self._file.close()


def make_spill(layout: Layout, folder: Path, model: nn.Module, inputs: Any, device: str) -> Spill | None:
    """What takes the memory of waiting samples, as the plan has laid it out; None when they keep it.

    Args:
        layout: of the run.
        folder: on the disk that has room for a file.
        model: see :class:`Spill`.
        inputs: see there.
        device: the torch device of the activations.
    """
    if layout.activations == "file":
        return Spill(FileStore(folder, device), model, inputs)
    if layout.activations == "host" and layout.separate:
        return Spill(HostStore(device), model, inputs)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Plain tensors in a value, and those that they are views of; parameters belong to the model."""
    if isinstance(value, Tensor):
        base = value._base
        if type(value) is Tensor and value.layout is torch.strided and not isinstance(base, nn.Parameter):
            yield value
            if base is not None:
                yield base
    elif isinstance(value, Mapping):
        yield from (one for part in value.values() for one in _tensors(part))
    elif isinstance(value, (tuple, list)):
        yield from (one for part in value for one in _tensors(part))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (one for part in fields(value) for one in _tensors(getattr(value, part.name)))


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _users(storage: torch.UntypedStorage) -> int:
    """How many tensors look at a storage; the object that stands for it in Python does as well."""
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The whole storage as uint8 [n]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
