# SPDX-License-Identifier: Apache-2.0
"""Streams of an accelerator, and memory of the host that it reads and writes by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from modelslim.devices import is_host

_log = logging.getLogger("modelslim")


class Streams:
    """What copies beside the computation need of an accelerator.

    An accelerator works off each stream in order, and different streams at once; the host goes on meanwhile. What one
    stream must not do before another has done something waits for an event of the other. Streams and events are those
    of the device's torch module, which all accelerators have alike.

    Args:
        device: its torch device.

    Attributes:
        up: the stream of copies to the device.
        down: the stream of copies to the host.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._pins = True
        self.up: Any = self._module.Stream(device=device)
        self.down: Any = self._module.Stream(device=device)

    def current(self) -> Any:
        """The stream on which the calling thread computes."""
        return self._module.current_stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Let the calling thread compute, and take device memory, on a stream while this is open."""
        found: AbstractContextManager[Any] = self._module.stream(stream)
        return found

    def holds(self, tensor: Tensor) -> bool:
        """True for a tensor of the device."""
        return not tensor.is_cpu

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, of the current stream: what frees it leaves it to that stream."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Memory of the host that stays where it is; None when there is none to be had, which is told once.

        Torch gives it to somebody else only behind the copies from and to it that were begun.
        """
        if not self._pins:
            return None
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:  # torch has no narrower class for it
            self._pins = False
            _log.warning("no pinned memory (%s): copies from and to %s wait for each other", error, self._device)
            return None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin a copy on the current stream; the host waits for it where its memory is not pinned."""
        host = target if self.holds(source) else source
        target.copy_(source, non_blocking=host.is_pinned())

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Have the memory of a device tensor given away only behind what the stream does with it up to its end."""
        tensor.record_stream(stream)


@cache
def streams_of(device: str) -> Streams | None:
    """The streams of a device, the same ones for all; None for the CPU, which copies nothing."""
    return None if is_host(device) else Streams(device)
