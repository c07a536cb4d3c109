# SPDX-License-Identifier: Apache-2.0
"""How much memory a run may take, and how it keeps to that: where activations wait, whether it reads ahead."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelslim.devices import EXAMPLE, forget_peak, peak_device_memory, resolve_device
from modelslim.errors import UsageError

_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B", re.IGNORECASE)
_HINT = f"write a size, and another one for a device, as in 24GiB or 24GiB,{EXAMPLE}=60GiB"


@dataclass(frozen=True)
class Budget:
    """What a run may hold at once, beyond what the process held when it began.

    Attributes:
        host: bytes of the computer's memory; None for no limit.
        devices: bytes of accelerators, by torch device.
    """

    host: int | None = None
    devices: Mapping[str, int] = field(default_factory=dict)

    def of(self, place: str) -> int | None:
        """The bytes of ``host`` or of a device; None for no limit."""
        return self.host if place == "host" else self.devices.get(place)


def parse_budget(text: str | None) -> Budget:
    """What ``--max_memory`` says: ``24GiB``, ``24GiB,cuda:0=60GiB``.

    Raises:
        UsageError: it is not of this form, names a device that is not there, or names one twice.
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text is not None else ():
        device, _, size = part.rpartition("=")
        if "=" in part and not device.strip():
            raise UsageError(f"--max_memory {text!r}: {part!r} names no device", hint=_HINT)
        place = _place(text, device.strip())
        if place in found:
            raise UsageError(f"--max_memory {text!r} gives {place} two sizes", hint=_HINT)
        found[place] = _bytes(text, size.strip())
    return Budget(found.pop("host", None), found)


def _place(text: str | None, device: str) -> str:
    try:
        place = resolve_device(device) if device else "cpu"
    except UsageError as error:
        raise UsageError(f"--max_memory {text!r}: {device!r} is no device of this machine", hint=_HINT) from error
    return "host" if place == "cpu" else place


def _bytes(text: str | None, size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None or (match["binary"] and not match["unit"]):
        number = re.match(r"(\d+(?:\.\d+)?)\s*([KMGT]?)", size, re.IGNORECASE)
        meant = f"did you mean {number[1]}{number[2].upper() or 'G'}iB? " if number else ""
        raise UsageError(f"--max_memory {text!r}: {size!r} is not a size", hint=meant + _HINT)
    unit = match["unit"].upper()
    base = 2 ** _UNITS[unit] if match["binary"] else 10 ** (_UNITS[unit] // 10 * 3) if unit else 1
    nbytes = int(float(match["number"]) * base)
    if not nbytes:
        raise UsageError(f"--max_memory {text!r}: a run needs some memory", hint=_HINT)
    return nbytes


def in_words(nbytes: float) -> str:
    """A number of bytes as people read it."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:,.{1 if nbytes < 100 * size else 0}f} {unit}"
    return f"{nbytes / 1e3:,.0f} kB"


def peaks_in_words(peaks: Mapping[str, int]) -> str:
    """Bytes by place, the computer's own memory first."""
    return ", ".join(in_words(nbytes) + ("" if place == "host" else f" on {place}") for place, nbytes in peaks.items())


class Meter:
    """Measures the most memory that is held from ``start`` on, beyond what was held then."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before: int | None = None

    def start(self) -> None:
        """Begin. The kernel forgets its peak, where it can, so that imports and the plan do not count."""
        forget_peak(self._device)
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            with suppress(OSError):  # a container may forbid it; then the peak of the imports counts where it is higher
                clear.write_text("5")
        self._before = resident_memory("VmRSS")

    def peaks(self) -> dict[str, int]:
        """Bytes by place: ``host`` where the system tells, and the device where there is one."""
        peaks = dict(peak_device_memory(self._device))
        highest = resident_memory("VmHWM")
        if highest is not None and self._before is not None:
            peaks["host"] = max(highest - self._before, 0)
        return dict(sorted(peaks.items(), reverse=True))


class Trimmer:
    """Says what the C library does with freed memory.

    Memory that it gives back must be cleared by the kernel when it is wanted again, which may be a tenth of a run's
    time. So it keeps what comes and goes from unit to unit, and gives back only what holes between tensors make it
    grow beyond that; unless memory is scarce: then it gives back all, as soon as a lot has come together.

    Args:
        is_scarce: True where the run has a budget.
    """

    def __init__(self, *, is_scarce: bool) -> None:
        self._is_scarce = is_scarce
        self._library = _gnu_library()
        self._usual: int | None = None
        if self._library is not None and not is_scarce:
            self._library.mallopt(_M_MMAP_THRESHOLD, _KEPT_TENSOR)
            self._library.mallopt(_M_TRIM_THRESHOLD, _KEPT)

    def look(self) -> None:
        """Act where the process has grown; to be called again and again at the same place."""
        now = resident_memory("VmRSS")
        if self._library is None or now is None:
            return
        if self._usual is None and not self._is_scarce:
            self._usual = now
        elif self._usual is None or now > self._usual + _GROWN:
            self._library.malloc_trim(0)
            self._usual = resident_memory("VmRSS") if self._is_scarce else None


_GROWN = 16 << 20
"""Bytes by which a process may grow before memory is given back."""
_KEPT_TENSOR = 32 << 20
"""Bytes of the largest tensor whose memory is kept; the most that the library allows."""
_KEPT = 256 << 20
"""Free bytes at the end of its memory that the library keeps."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _gnu_library() -> ctypes.CDLL | None:
    """The GNU C library; None where another one is in use."""
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (AttributeError, OSError, TypeError):
        return None


def resident_memory(field_name: str) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (at most so far) of this process in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    match = re.search(rf"{field_name}:\s+(\d+) kB", status.read_text())
    return int(match[1]) * 1024 if match else None
