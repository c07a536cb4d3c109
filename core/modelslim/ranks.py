# SPDX-License-Identifier: Apache-2.0
"""The processes that share a run, and what they say to each other.

Every rank runs the same plan on samples of its own. All that they exchange is exchanged by all of them in
the same order; what is summed is summed in the order of the samples, never in that of the ranks, so that
their number changes no bit of the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelslim.devices import communication_backend, set_device
from modelslim.errors import RankError
from modelslim.wire import put_together, take_apart

_CHUNK = 64 << 20  # bytes sent at once
_FRAME, _LENGTH = 16 << 10, 8  # bytes of a message that are sent first, and of these for its length


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them.

    Attributes:
        rank: the number of this one; 0 writes the result and talks to the user.
        size: how many there are.
        device: where its tensors are.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """True for the rank that writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every rank has to say, by rank.

        Args:
            value: of tensors, plain values, and tuples, lists and mappings of them. Tensors keep dtype and shape,
                and come back on this rank's device.

        Raises:
            RankError: another rank has ended.
        """
        if self.size == 1:
            return [value]
        with _explained():
            own = _Message.of(value)
            frames = [torch.empty(_FRAME, dtype=torch.uint8) for _ in range(self.size)]
            torch.distributed.all_gather(frames, own.frame())
            return [self._said(source, frame, own) for source, frame in enumerate(frames)]

    def share(self, value: Any, source: int = 0) -> Any:
        """What one rank has to say, at all of them.

        Args:
            value: see ``gather``; only that of the source counts.
            source: its number.
        """
        if self.size == 1:
            return value
        with _explained():
            own = _Message.of(value if source == self.rank else None)
            frame = own.frame()
            torch.distributed.broadcast(frame, source)
            return self._said(source, frame, own)

    def _said(self, source: int, frame: Tensor, own: _Message) -> Any:
        """What a rank says, whose message begins with the frame; this rank sends the rest of its own."""
        rest = max(0, int(frame[:_LENGTH].view(torch.int64)) + _LENGTH - _FRAME)
        if source == self.rank:
            if rest:
                self._send(own.data[-rest:], source)
            for bundle in _bundles([_nbytes(one) for one in own.tensors]):
                self._send(_packed([own.tensors[index] for index in bundle], self.device), source)
            return own.value
        data = torch.cat([frame, frame.new_empty(rest)])
        if rest:
            self._send(data[_FRAME:], source)
        end = int(data[:_LENGTH].view(torch.int64)) + _LENGTH
        parts, shapes = json.loads(data[_LENGTH:end].numpy().tobytes())
        empty = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for _, dtype, shape in shapes]
        received: dict[int, Tensor] = {}
        for bundle in _bundles([_nbytes(one) for one in empty]):
            sizes = [_padded(_nbytes(empty[index])) for index in bundle]
            content = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            self._send(content, source)
            for index, piece in zip(bundle, torch.split(content, sizes), strict=True):
                like = empty[index]
                received[shapes[index][0]] = piece[: _nbytes(like)].view(like.dtype).view(like.shape)
        return put_together(parts, received)

    def _send(self, data: Tensor, source: int) -> None:
        """Broadcast bytes, which every backend knows."""
        for piece in torch.split(data, _CHUNK):
            torch.distributed.broadcast(piece, source)


@dataclass(frozen=True)
class _Message:
    """What a rank says.

    Attributes:
        value: the value.
        data: what it is beside its tensors, as JSON, uint8.
        tensors: its tensors.
    """

    value: Any
    data: Tensor
    tensors: list[Tensor]

    @classmethod
    def of(cls, value: Any) -> _Message:
        tensors: dict[int, Tensor] = {}
        parts = take_apart(value, tensors)
        shapes = [[key, str(one.dtype).removeprefix("torch."), list(one.shape)] for key, one in tensors.items()]
        data = torch.frombuffer(bytearray(json.dumps([parts, shapes]).encode()), dtype=torch.uint8)
        return cls(value, data, list(tensors.values()))

    def frame(self) -> Tensor:
        """The length of ``data``, and its beginning, in as many bytes as others expect: most messages are short."""
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        frame[:_LENGTH] = torch.tensor([len(self.data)]).view(torch.uint8)
        beginning = self.data[: _FRAME - _LENGTH]
        frame[_LENGTH : _LENGTH + len(beginning)] = beginning
        return frame


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(nbytes: int) -> int:
    """Each tensor begins where one of any dtype may."""
    return -(-nbytes // 8) * 8


def _bundles(sizes: Sequence[int]) -> list[list[int]]:
    """Neighbours that are sent at once: a message costs as much as thousands of bytes."""
    bundles: list[list[int]] = []
    free = 0
    for index, size in enumerate(sizes):
        if size > free or not bundles:
            bundles.append([])
            free = _CHUNK
        bundles[-1].append(index)
        free -= size
    return bundles


def _packed(tensors: Sequence[Tensor], device: str) -> Tensor:
    """Their bytes, one after the other."""
    pieces = []
    for tensor in tensors:
        data = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
        pieces += [data, data.new_zeros(_padded(data.numel()) - data.numel())]
    return torch.cat(pieces)


ALONE = Ranks()
"""A run in one process."""


@contextmanager
def joined(rank: int, size: int, device: str, meeting: Path | None = None) -> Iterator[Ranks]:
    """Be one of several ranks while this is open.

    Args:
        rank: number of this one.
        size: how many there are.
        device: where its tensors are.
        meeting: a file through which ranks of one machine find each other; None when ``MASTER_ADDR`` and
            ``MASTER_PORT`` say where, as torchrun does.

    Raises:
        RankError: they do not meet.
    """
    if size == 1:
        yield Ranks(device=device)
        return
    set_device(device)
    with _explained():
        torch.distributed.init_process_group(
            communication_backend(device),
            init_method="env://" if meeting is None else meeting.as_uri(),
            rank=rank,
            world_size=size,
        )
    try:
        yield Ranks(rank, size, device)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    """Say what a broken connection means."""
    try:
        yield
    except torch.distributed.DistBackendError as error:
        raise _ended(error) from error
    except RuntimeError as error:
        words = ("Connection closed", "Connection reset", "Broken pipe", "timed out", "Timed out", "recv", "send")
        if not any(word in str(error) for word in words):
            raise
        raise _ended(error) from error


def _ended(error: Exception) -> RankError:
    first, _, _ = str(error).partition("\n")
    return RankError(
        f"another rank has ended: {first}",
        hint="see what it said; the same command continues after the last finished unit",
    )
