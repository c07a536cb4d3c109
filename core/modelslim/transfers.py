# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and an accelerator beside what it computes; on the CPU there is nothing to copy.

Nobody may look at a copy before its event: ``Arrival.take`` lets the computation wait for it, ``Departure.wait``
the thread that reads it. The thread that computes goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelslim.streams import Streams, streams_of

PIECE = 32 << 20
"""Bytes of each of the two pinned buffers through which a unit goes to the device."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Arrival:
    """Tensors that are on their way to a device.

    Attributes:
        tensors: by name; not to be used before ``take``.
        streams: of the device; None where they are there already.
        done: the event behind their copies.
    """

    tensors: Mapping[str, Tensor]
    streams: Streams | None = None
    done: Any = None

    def take(self) -> Mapping[str, Tensor]:
        """The tensors. What the calling thread computes from now on waits for them; the thread does not."""
        if self.streams is not None:
            stream = self.streams.current()
            stream.wait_event(self.done)
            for tensor in self.tensors.values():
                self.streams.keep(tensor, stream)
        return self.tensors


class Uploads:
    """Brings tensors to a device through two small pinned buffers, one being filled while the other is copied.

    For one thread beside the one that computes; it waits for the copies, two pieces behind.

    Args:
        device: the torch device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._buffers: list[_Buffer] = []

    def begin(self, make: Callable[[Callable[[Tensor], Tensor]], Mapping[str, Tensor]]) -> Arrival:
        """Begin to bring tensors.

        Args:
            make: makes them, each by what it is given: that takes a tensor of the host and answers with its copy.
        """
        streams = streams_of(self._device)
        if streams is None:
            return Arrival(make(lambda tensor: tensor))
        with streams.on(streams.up):
            tensors = make(lambda tensor: self._copy(streams, tensor))
        return Arrival(tensors, streams, streams.up.record_event())

    def _copy(self, streams: Streams, tensor: Tensor) -> Tensor:
        there = streams.empty(tensor.shape, tensor.dtype)
        source, target = tensor.reshape(-1), there.view(-1)
        step = PIECE // tensor.dtype.itemsize
        for start in range(0, len(source), step):
            piece, place = source[start : start + step], target[start : start + step]
            buffer = self._next_buffer(streams)
            if buffer is None:
                streams.copy(place, piece)
                continue
            pinned = buffer.memory[: piece.nbytes].view(piece.dtype)
            streams.copy(place, pinned.copy_(piece))
            buffer.done = streams.up.record_event()
        return there

    def _next_buffer(self, streams: Streams) -> _Buffer | None:
        """The buffer that waits longest, when its last copy has left it; None where none can be pinned."""
        if len(self._buffers) < 2:
            memory = streams.pinned((PIECE,), torch.uint8)
            if memory is None:
                return None
            self._buffers.append(_Buffer(memory))
        else:
            self._buffers.append(self._buffers.pop(0))
        buffer = self._buffers[-1]
        if buffer.done is not None:
            buffer.done.synchronize()
        return buffer


@dataclass
class _Buffer:
    """Pinned memory, uint8 [PIECE], and the event behind the last copy from it."""

    memory: Tensor
    done: Any = None


class Departure:
    """Tensors that are on their way to the host, where nobody may look at them before ``wait``."""

    def __init__(self, streams: Streams | None = None) -> None:
        self._streams = streams
        self._done: Any = None

    @property
    def done(self) -> Any:
        """The event behind the copies; None where nothing is copied."""
        return self._done

    def bring(self, tensor: Tensor) -> Tensor:
        """The tensor on the host: itself where it is there, else its copy, which is being made."""
        if self._streams is None or not self._streams.holds(tensor):
            return tensor.to("cpu")
        host = self._streams.pinned(tensor.shape, tensor.dtype)
        if host is None:
            return tensor.to("cpu")
        self._streams.copy(host, tensor)
        self._streams.keep(tensor, self._streams.down)
        return host

    def bring_module(self, module: Module) -> Module:
        """The module, all its tensors brought."""
        moved: Module = module._apply(self.bring)  # type: ignore[no-untyped-call]
        return moved

    def wait(self) -> None:
        """Let the calling thread wait until the copies are made."""
        if self._done is not None:
            self._done.synchronize()

    def _end(self, done: Any) -> None:
        self._done = done


@contextmanager
def departure(device: str) -> Iterator[Departure]:
    """Bring tensors to the host while this is open, as the calling thread's computation leaves them.

    They must not be changed any more; their memory may be freed at once.
    """
    streams = streams_of(device)
    made = Departure(streams)
    if streams is None:
        yield made
        return
    streams.down.wait_event(streams.current().record_event())
    with streams.on(streams.down):
        yield made
    made._end(streams.down.record_event())


def bring_back(name: str, host: Tensor, left: Departure, device: str) -> Arrival:
    """Begin to bring what has departed, or is departing, back to the device.

    Args:
        name: its name in what arrives.
        host: what ``left.bring`` gave.
        left: how it went.
        device: the torch device.
    """
    streams = streams_of(device)
    if streams is None:
        return Arrival({name: host})
    streams.up.wait_event(left.done)
    with streams.on(streams.up):
        there = streams.empty(host.shape, host.dtype)
        streams.copy(there, host)
    return Arrival({name: there}, streams, streams.up.record_event())
