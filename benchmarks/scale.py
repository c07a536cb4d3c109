# SPDX-License-Identifier: Apache-2.0
"""Time, memory and traffic of W8A8 static for models of 8B to 1T on 1, 8 and 64 devices, by the formula of ``plan``.

python benchmarks/scale.py            the tables of docs/scale.md, from the formula alone
python benchmarks/scale.py --measure  the rates of this machine, its disk included
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from modelslim.costs import Job, Layout, Machine, UnitFacts, peaks, phases
from modelslim.machines import ACCELERATOR, CPU, measured
from modelslim.memory import in_words

SAMPLES, TOKENS = 128, 2048


@dataclass(frozen=True)
class Shape:
    """A decoder: grouped-query attention and a gated MLP, or experts in its place."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    experts: int = 1
    chosen: int = 1
    shared: int = 0


SHAPES = (
    Shape("8B (Llama 3.1)", 4096, 32, 32, 8, 128, 14336, 128256),
    Shape("70B (Llama 3.3)", 8192, 80, 64, 8, 128, 28672, 128256),
    Shape("235B-A22B (Qwen3)", 4096, 94, 64, 4, 128, 1536, 151936, experts=128, chosen=8),
    # Attention of latent type weighs about as much as 64 heads of 64 with 32 of keys.
    Shape("1T-A32B (Kimi K2)", 7168, 61, 64, 32, 64, 2048, 163840, experts=384, chosen=8, shared=1),
)


def job(shape: Shape, samples: int = SAMPLES, tokens: int = TOKENS) -> Job:
    """W8A8 static of all linears of the layers: ranges of the inputs, weights rounded to nearest, bfloat16 source."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * queries + 2 * keys)
    expert = 3 * shape.hidden * shape.inner
    gate = shape.hidden * shape.experts if shape.experts > 1 else 0
    values = attention + (shape.experts + shape.shared) * expert
    active = attention + gate + (shape.chosen + shape.shared) * expert
    inputs = 3 * shape.hidden + queries + (shape.chosen + shape.shared) * (2 * shape.hidden + shape.inner)
    outputs = queries + 2 * keys + shape.hidden + (shape.chosen + shape.shared) * (2 * shape.inner + shape.hidden)
    ports = 2 * shape.hidden + queries + shape.experts * (shape.hidden + shape.inner)
    unit = UnitFacts(
        name="layer",
        stored_bytes=2 * (values + gate),
        held_bytes=2 * (values + gate),
        result_bytes=values + 2 * gate,
        values=values,
        largest=max(shape.hidden * queries, shape.hidden * shape.inner),
        macs=active,
        width=inputs + outputs,
        statistics_bytes=16 * ports,
        count=shape.layers,
        linears=4 + 3 * (1 if shape.experts == 1 else 1 + shape.shared),
    )
    table = 2 * shape.vocabulary * shape.hidden
    return Job(
        units=[unit],
        outside_bytes=table,
        outside=None,
        copied_bytes=2 * table,
        verified_bytes=values * shape.layers,
        samples=samples,
        tokens=samples * tokens,
        longest=tokens,
        hidden_bytes=2 * shape.hidden,
        item_bytes=2,
    )


def settings() -> Iterator[tuple[str, Machine, Layout]]:
    """The machines of the table, and what runs on them hold where."""
    yield "2 cores", CPU, Layout("file")
    for devices in (1, 8, 64):
        yield f"{devices} device{'s' if devices > 1 else ''}", ACCELERATOR, Layout("host", separate=True, ranks=devices)


def tables() -> str:
    """The tables of docs/scale.md."""
    lines = ["| rate | " + " | ".join(("2 cores (measured)", "device (assumed)")) + " |", "|---|---|---|"]
    for field in fields(Machine):
        if field.type == "float":
            pair = (getattr(machine, field.name) for machine in (CPU, ACCELERATOR))
            lines.append(f"| {field.name} | " + " | ".join(f"{value:.3g}" for value in pair) + " |")
    lines += [
        "",
        "| model | weights | on | time | host memory | device memory | read | written | sent by a device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        work = job(shape)
        size = work.copied_bytes + sum(unit.count * unit.stored_bytes for unit in work.units)
        for name, machine, layout in settings():
            found = phases(work, machine, layout)
            tops = peaks(found)
            device = in_words(tops["device"].device_bytes) if "device" in tops else ""
            traffic = (sum(getattr(phase, kind) for phase in found) for kind in ("read", "written", "exchanged"))
            seconds = sum(phase.seconds for phase in found)
            lines.append(
                f"| {shape.name} | {in_words(size)} | {name} | {_time(seconds)} | "
                f"{in_words(tops['host'].host_bytes)} | {device} | "
                + " | ".join(in_words(one) if one else "" for one in traffic)
                + " |"
            )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measure(folder: Path | None) -> None:
    """Print the rates of this machine."""
    machine = measured()
    for name in ("macs", "float32_macs", "rounded", "copied", "passed"):
        print(f"{name:14s}{getattr(machine, name):.3g}")
    block = os.urandom(1 << 26)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.monotonic()
        for _ in range(16):
            file.write(block)
        os.fsync(file.fileno())
        print(f"{'written':14s}{16 * len(block) / (time.monotonic() - start):.3g}")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.monotonic()
        while file.readinto(bytearray(1 << 26)):
            pass
        print(f"{'read':14s}{16 * len(block) / (time.monotonic() - start):.3g}")


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="time this machine instead")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be timed")
    options = parser.parse_args()
    if options.measure:
        measure(options.folder)
    else:
        print(tables())


if __name__ == "__main__":
    main()
