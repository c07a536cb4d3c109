# SPDX-License-Identifier: Apache-2.0
"""What a run costs, predicted from sizes alone: bytes held and seconds by phase; docs/scale.md explains every term.

``plan`` fills a :class:`Job` from config.json and the headers of the weight files; benchmarks/scale.py fills it for
models that nobody has at hand. Both use the same formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Literal

Place = Literal["device", "host", "file"]

STREAM_TENSORS = 2
"""Tensors of a sample's hidden size that wait with it: the call's own, and the embeddings that its forward holds."""
SIDE_BYTES = 512
"""Bytes of a token for all else that waits with it: rotary tables, positions, ids."""
FIXED_BYTES = 16 << 20
"""Buffers of libraries, code that is imported late, threads."""
HOLE_BYTES = 32 << 20
"""What the allocator keeps of freed activations before it is made to give it back."""
CHUNK_BYTES = 64 << 20
"""What is rounded or verified goes in pieces of at most so many bytes."""
COPY_BYTES = 8 << 20
"""What is copied goes in pieces of so many bytes."""
FIXED_SECONDS = 0.5
"""Of the report and its page, at any size."""
LINEAR_SECONDS = 3e-3
"""Of a linear that is judged, beside its multiplications."""
JUDGED_ROWS = 256
"""Tokens that judge a linear, once float and once quantized."""
SCORE_FACTOR = 2
"""Attention scores take so many times the seconds of as many multiplications by weights."""
KERNEL_RATE = 2e8
"""Bytes of kernels that libraries prepare in a second."""
KL_TOKENS, KL_POSITIONS = 32, 8
"""Of each text whose KL per layer is measured so many tokens are followed, and so many compared."""
KL_LOGITS = 1 << 23
"""Logits in memory at once, where one unit's are not more."""


def kl_texts(tokens: int) -> int:
    """For how many texts KL per layer is measured: what it costs stays in proportion to the calibration tokens."""
    return min(max(tokens // 8192, 2), 8)


@dataclass(frozen=True)
class UnitFacts:
    """What is known of a unit before it is read.

    Attributes:
        name: its name.
        stored_bytes: what is read of it.
        held_bytes: what it weighs once loaded.
        result_bytes: what is written of it.
        values: weights that become codes.
        largest: values of the largest weight, of one expert where they are fused.
        macs: multiplications that one token takes.
        width: channels that one token's activations have inside the unit, of all linears together.
        statistics_bytes: what is measured.
        gram_cubes: sum of ``in ** 3 + 2 * in ** 2 * out`` over linears that are rounded with a Gram matrix.
        gram_updates: sum of ``in ** 2`` over inputs whose Gram matrix is summed, for each token.
        largest_gram: values of the largest Gram matrix.
        passes: how often every sample passes it.
        count: how many such units stand one behind the other.
        linears: how many are quantized; fused experts count as one.
    """

    name: str
    stored_bytes: int
    held_bytes: int
    result_bytes: int
    values: int
    largest: int
    macs: int
    width: int
    statistics_bytes: int = 0
    gram_cubes: int = 0
    gram_updates: int = 0
    largest_gram: int = 0
    passes: int = 1
    count: int = 1
    linears: int = 0


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        units: its units in order.
        outside_bytes: what is loaded to bring all samples to the first unit: embeddings.
        outside: the quantized linears outside the units, as one more unit; None when there is none.
        copied_bytes: what goes from the source into the result unread by anybody.
        verified_bytes: what is read again to be verified; 0 when it is not.
        samples: how many calibration samples.
        tokens: of all of them together.
        longest: tokens of the longest.
        hidden_bytes: of one token between two units.
        item_bytes: of one activation.
        streams: 2 when each sample also passes the float model.
        holds_outputs: True when the outputs of a unit wait, too.
        replays: True when an algorithm wants all calls of a unit in memory.
        row_counts: how many different numbers of tokens pass at once.
        kernel_bytes: what libraries prepare, and keep, for each of these numbers and each shape of a weight.
        head_bytes: of what lies behind the last unit and reads KL per layer; 0 where it is not read.
        vocabulary: of the head.
    """

    units: Sequence[UnitFacts]
    outside_bytes: int
    outside: UnitFacts | None
    copied_bytes: int
    verified_bytes: int
    samples: int
    tokens: int
    longest: int
    hidden_bytes: int
    item_bytes: int
    streams: int = 1
    holds_outputs: bool = False
    replays: bool = False
    row_counts: int = 1
    kernel_bytes: int = 0
    head_bytes: int = 0
    vocabulary: int = 0

    @property
    def activation_bytes(self) -> int:
        """What waits at a unit boundary."""
        tensors = STREAM_TENSORS * self.streams + self.holds_outputs
        return self.tokens * (tensors * self.hidden_bytes + SIDE_BYTES * self.streams)

    @property
    def score_macs(self) -> int:
        """Multiplications of a token with the others of its sample, twice, over all heads of a unit."""
        return 2 * self.tokens // max(self.samples, 1) * self.hidden_bytes // self.item_bytes

    @property
    def sample_bytes(self) -> int:
        """What waits with the longest sample."""
        return self.activation_bytes * self.longest // max(self.tokens, 1)


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second.

    Attributes:
        name: of the kind of machine.
        macs: multiplications of the model's forward.
        float32_macs: multiplications of float32 matrices, for Gram matrices and their inverses.
        rounded: weights that are rounded to nearest, with their range found.
        read, written: bytes of the disk, shared by all devices of a host.
        copied: bytes from memory to memory.
        passed: channels of activations that pass norms, gates, additions and what measures them.
        exchanged: bytes that one device sends the others.
        devices_per_host: so many share a host's disk and memory.
    """

    name: str
    macs: float
    float32_macs: float
    rounded: float
    read: float
    written: float
    copied: float
    passed: float
    exchanged: float = 10e9
    devices_per_host: int = 1


@dataclass(frozen=True)
class Layout:
    """What a run holds where.

    Attributes:
        activations: where samples wait.
        ahead: True to read the next unit, and to write the last one, while one is at work.
        separate: True when the device has a memory of its own.
        ranks: devices that share the samples and the weight work.
        whole: True when all units are loaded at once.
    """

    activations: Place = "host"
    ahead: bool = True
    separate: bool = False
    ranks: int = 1
    whole: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: what is done.
        seconds: how long.
        host: bytes that the computer's memory holds at most, by what they are.
        device: the same of each accelerator; empty where the computer computes itself.
        read, written: bytes of the disk.
        exchanged: bytes that one device sends to others.
    """

    name: str
    seconds: float
    host: Mapping[str, int]
    device: Mapping[str, int] = field(default_factory=dict)
    read: int = 0
    written: int = 0
    exchanged: int = 0

    @property
    def host_bytes(self) -> int:
        """Bytes in the computer's memory."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on each accelerator."""
        return sum(self.device.values())


def phases(job: Job, machine: Machine, layout: Layout) -> list[Phase]:
    """The phases of a run, in order."""
    found = []
    if job.samples:
        found.append(_embed(job, machine, layout))
    found.append(_units(job, machine, layout))
    if job.head_bytes:
        found.append(_kl(job, machine, layout))
    if job.outside is not None:
        found.append(_outside(job, machine, layout))
    found.append(_copy(job, machine, layout))
    if job.verified_bytes:
        found.append(_verify(job, machine, layout))
    found.append(Phase("report", FIXED_SECONDS, {"fixed": FIXED_BYTES}))
    return found


def peaks(found: Sequence[Phase]) -> dict[str, Phase]:
    """The phase that holds most, by place: ``host``, and ``device`` where there is one."""
    tops = {"host": max(found, key=lambda phase: phase.host_bytes)}
    if any(phase.device for phase in found):
        tops["device"] = max(found, key=lambda phase: phase.device_bytes)
    return tops


def _embed(job: Job, machine: Machine, layout: Layout) -> Phase:
    loaded = {"embeddings": job.outside_bytes, "fixed": FIXED_BYTES}
    seconds = job.outside_bytes / machine.read + job.activation_bytes / layout.ranks / machine.copied
    return _phase("embeddings", seconds, loaded, _waiting(job, layout), layout, read=job.outside_bytes)


def _units(job: Job, machine: Machine, layout: Layout) -> Phase:
    seconds = job.kernel_bytes / KERNEL_RATE
    for unit in job.units:
        work = unit_seconds(job, unit, machine, layout)
        read, written = work.pop("read"), work.pop("write")
        computed = sum(work.values())
        seconds += unit.count * (max(computed, read, written) if layout.ahead else computed + read + written)
    if layout.ahead and job.units:  # the first is waited for, and the last has nothing beside it
        first, last = (unit_seconds(job, unit, machine, layout) for unit in (job.units[0], job.units[-1]))
        seconds += first["read"] + last["write"]
    fullest = max(range(len(job.units)), key=lambda index: sum(_unit_memory(job, index, layout).values()))
    return _phase(
        "units",
        seconds,
        _unit_memory(job, fullest, layout),
        _waiting(job, layout),
        layout,
        read=sum(unit.count * unit.stored_bytes for unit in job.units),
        written=sum(unit.count * unit.result_bytes for unit in job.units),
        exchanged=sum(unit.count * _exchanged(unit, layout) for unit in job.units),
        codes=job.units[fullest].values,
    )


def _kl(job: Job, machine: Machine, layout: Layout) -> Phase:
    """The head reads float and quantized states behind every unit; the last unit has been released."""
    texts = -(-kl_texts(job.tokens) // layout.ranks)
    rows = 2 * texts * KL_POSITIONS
    count = sum(unit.count for unit in job.units)
    memory = {
        "head": job.head_bytes,
        "logits": 4 * min(max(KL_LOGITS, rows * job.vocabulary), count * rows * job.vocabulary),
        "states": count * rows * job.hidden_bytes,
        "codes": job.units[-1].values,
        # Of the last unit: what it held is not given back at once.
        "forward": job.longest * job.units[-1].width * job.item_bytes * 2,
        "kernels": job.kernel_bytes,
        "fixed": FIXED_BYTES,
    }
    macs = count * rows * job.head_bytes // job.item_bytes
    macs += 2 * texts * KL_TOKENS * sum(unit.count * unit.macs for unit in job.units)
    seconds = job.head_bytes / machine.read + macs / machine.macs
    seconds += sum(unit.count * unit.linears for unit in job.units) * LINEAR_SECONDS
    return _phase("KL per layer", seconds, memory, _waiting(job, layout), layout, read=job.head_bytes)


def unit_seconds(job: Job, unit: UnitFacts, machine: Machine, layout: Layout) -> dict[str, float]:
    """Seconds of the work on one unit, by what is done."""
    share = job.tokens / layout.ranks
    spilled = 0.0
    if layout.activations == "file" or (layout.activations == "host" and layout.separate):
        spilled = 2 * unit.passes * job.activation_bytes / layout.ranks / machine.copied
    return {
        "read": unit.stored_bytes / machine.read,
        "forward": unit.passes * share * _token_seconds(job, unit, machine) + spilled,
        "statistics": share * unit.gram_updates / machine.float32_macs,
        "rounding": (unit.values / machine.rounded + unit.gram_cubes / machine.float32_macs) / layout.ranks,
        "judging": _judging(unit, machine) / layout.ranks if job.samples and unit.passes else 0.0,
        "exchange": _exchanged(unit, layout) / machine.exchanged,
        "write": unit.result_bytes / machine.written,
    }


def _token_seconds(job: Job, unit: UnitFacts, machine: Machine) -> float:
    """Of one token's way through a unit."""
    return (unit.macs + SCORE_FACTOR * job.score_macs) / machine.macs + unit.width / machine.passed


def _judging(unit: UnitFacts, machine: Machine) -> float:
    return unit.linears * LINEAR_SECONDS + 2 * JUDGED_ROWS * unit.values / machine.macs


def _exchanged(unit: UnitFacts, layout: Layout) -> int:
    """Statistics go to all ranks, and codes to the one that writes."""
    return 0 if layout.ranks == 1 else 2 * unit.statistics_bytes + unit.values


def _unit_memory(job: Job, index: int, layout: Layout) -> dict[str, int]:
    """What is held beside the waiting activations, by what it is."""
    unit = job.units[index]
    following = job.units[min(index + 1, len(job.units) - 1)] if unit.count == 1 else unit
    memory = {f"unit {unit.name}": unit.held_bytes}
    if layout.whole:
        memory = {"all units": sum(one.count * one.held_bytes for one in job.units)}
    elif layout.ahead:
        memory["next unit"] = following.held_bytes
    if layout.ahead:
        memory["unit being written"] = (unit if unit.count > 1 or not index else job.units[index - 1]).values
    if job.samples:
        memory["statistics"] = unit.statistics_bytes
        memory["kernels"] = job.kernel_bytes
    memory["fixed"] = FIXED_BYTES
    rounding = {"codes": unit.values, "rounding": min(CHUNK_BYTES, 4 * unit.largest)}
    rounding["rounding"] += 4 * (3 * unit.largest_gram + (2 * unit.largest if unit.largest_gram else 0))
    forward = _forward_memory(job, unit)
    return memory | max(rounding, forward, key=lambda parts: sum(parts.values()))


def _forward_memory(job: Job, unit: UnitFacts) -> dict[str, int]:
    """What samples need on their way through a unit; no codes are there yet, unless they pass quantized linears."""
    if not job.samples:
        return {}
    activations = job.longest * unit.width * job.item_bytes
    # Tensors of many sizes leave holes that fit none of the next; libraries repack a weight to multiply by it.
    memory = {"forward": activations * 2 - activations // job.row_counts + unit.largest * job.item_bytes}
    memory["kept by the allocator"] = HOLE_BYTES
    memory["forward"] += 4 * job.longest * isqrt(unit.largest_gram)
    if unit.passes > 1:
        memory["codes"] = unit.values
        memory["decoded weights"] = 4 * unit.values
    return memory


def _outside(job: Job, machine: Machine, layout: Layout) -> Phase:
    unit = job.outside
    assert unit is not None
    seconds = unit.stored_bytes / machine.read + unit.values / machine.rounded + unit.result_bytes / machine.written
    memory = {"weights outside the units": unit.held_bytes, "codes": unit.values, "fixed": FIXED_BYTES}
    memory["rounding"] = min(CHUNK_BYTES, 4 * unit.largest)
    passed = job.samples and unit.passes
    if passed:
        seconds += job.tokens * unit.macs / machine.macs + _judging(unit, machine)
        memory |= _forward_memory(job, replace(unit, passes=1))
    waiting = _waiting(job, layout) if passed else {}
    return _phase(
        "outside the units",
        seconds,
        memory,
        waiting,
        layout,
        read=unit.stored_bytes,
        written=unit.result_bytes,
        codes=unit.values,
    )


def _copy(job: Job, machine: Machine, layout: Layout) -> Phase:
    seconds = job.copied_bytes / machine.read + job.copied_bytes / machine.written
    memory = {"piece": COPY_BYTES, "fixed": FIXED_BYTES}
    return Phase("copying", seconds, memory, read=job.copied_bytes, written=job.copied_bytes)


def _verify(job: Job, machine: Machine, layout: Layout) -> Phase:
    largest = max((unit.largest for unit in (*job.units, *([job.outside] if job.outside else []))), default=0)
    # Codes as they are stored, as they were decoded, and as they are encoded again; sums go in pieces.
    memory = {"largest linear": 3 * largest, "piece": min(CHUNK_BYTES, 8 * largest), "fixed": FIXED_BYTES}
    seconds = job.verified_bytes / machine.read + job.verified_bytes / machine.rounded
    return Phase("verification", seconds, memory, read=job.verified_bytes)


def _waiting(job: Job, layout: Layout) -> dict[str, int]:
    """Activations by place; a file weighs nothing, but those that are awake do."""
    everything = -(-job.activation_bytes // layout.ranks)
    if not job.samples:
        return {}
    # The one at work and the one before; the one that leaves for the host, and the one that comes back from there.
    moving = 2 if layout.separate and layout.activations == "host" else 0
    awake = min((2 + moving) * job.sample_bytes, everything)
    if layout.activations == "file":
        awake = everything if job.replays else awake
    held = {"device" if layout.separate else "host": everything if layout.activations == "device" else awake}
    if layout.activations == "host":
        held["host"] = everything
    return held


def _phase(
    name: str,
    seconds: float,
    memory: dict[str, int],
    waiting: Mapping[str, int],
    layout: Layout,
    *,
    read: int = 0,
    written: int = 0,
    exchanged: int = 0,
    codes: int = 0,
) -> Phase:
    """A phase whose memory lies where the work is done."""
    here = {"activations": waiting["host"]} if "host" in waiting else {}
    if not layout.separate:
        return Phase(name, seconds, {**memory, **here}, {}, read, written, exchanged)
    there = {"activations": waiting["device"]} if "device" in waiting else {}
    # The host reads a tensor at a time, and holds the codes that are being written.
    host = {"codes": codes, "unit being written": memory.get("unit being written", 0)}
    host |= {"piece": CHUNK_BYTES, "fixed": FIXED_BYTES}
    device = {name: nbytes for name, nbytes in memory.items() if name != "unit being written"}
    return Phase(name, seconds, {**host, **here}, {**device, **there}, read, written, exchanged)
