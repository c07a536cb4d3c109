# SPDX-License-Identifier: Apache-2.0
"""docs/scale.md: its tables are what the command prints, and the formula is what the page says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelslim.costs import FIXED_BYTES, Job, Layout, Machine, UnitFacts, phases

ROOT = Path(__file__).parents[2]

MACHINE = Machine("test", macs=1e9, float32_macs=1e8, rounded=1e6, read=1e6, written=1e6, copied=1e9)
UNIT = UnitFacts(
    "layer", stored_bytes=4_000, held_bytes=4_000, result_bytes=2_000, values=2_000, largest=1_000, macs=2_000, width=90
)


def job(count: int = 3, **changes: int) -> Job:
    sizes = {"samples": 8, "tokens": 8_000, "longest": 1_000, "hidden_bytes": 64, "item_bytes": 2, **changes}
    units = [UnitFacts(**{**UNIT.__dict__, "name": str(number)}) for number in range(count)]
    return Job(units, outside_bytes=500, outside=None, copied_bytes=800, verified_bytes=6_000, **sizes)


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks/scale.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == page.split("<!-- python benchmarks/scale.py -->")[1].split("<!-- end -->")[0].strip()


def test_time_is_the_longest_of_reading_writing_and_computing() -> None:
    """By hand: 8000 tokens times 2000 multiplications are 16 ms, 2000 weights 2 ms, reading 4 ms, writing 2 ms."""
    found = {phase.name: phase.seconds for phase in phases(job(), MACHINE, Layout())}
    assert found["units"] == pytest.approx(3 * 0.018 + 0.004 + 0.002)
    apart = {phase.name: phase.seconds for phase in phases(job(), MACHINE, Layout(ahead=False))}
    assert apart["units"] == pytest.approx(3 * (0.018 + 0.004 + 0.002))
    halved = {phase.name: phase.seconds for phase in phases(job(), MACHINE, Layout(ranks=2))}
    assert halved["units"] == pytest.approx(3 * (0.009 + 2_000 / 10e9) + 0.006)
    assert found["copying"] == pytest.approx(0.0016)
    assert found["verification"] == pytest.approx(0.012)


def test_memory_is_the_sum_that_the_page_says() -> None:
    waiting = 8_000 * (2 * 64 + 1024)
    forward = 2 * 1_000 * 90 * 2 + 1_000 * 2
    one = 4_000 + 2_000 + forward + 4_000 + FIXED_BYTES
    units = {phase.name: phase for phase in phases(job(), MACHINE, Layout())}["units"]
    assert units.host_bytes == one + 4_000 + 2_000 + waiting
    apart = {phase.name: phase for phase in phases(job(), MACHINE, Layout(ahead=False))}["units"]
    assert apart.host_bytes == one + waiting


@pytest.mark.parametrize("times", [4, 16])
def test_in_a_file_samples_cost_no_memory_and_layers_never_do(times: int) -> None:
    def peak(count: int, samples: int, layout: Layout) -> int:
        work = job(count, samples=8 * samples, tokens=8_000 * samples)
        return next(phase.host_bytes for phase in phases(work, MACHINE, layout) if phase.name == "units")

    assert peak(3, times, Layout("file")) == peak(3, 1, Layout("file")) < peak(3, 1, Layout())
    assert peak(3, times, Layout()) > peak(3, 1, Layout())
    assert peak(3 * times, 1, Layout()) == peak(3, 1, Layout())


def test_an_accelerator_holds_the_weights_and_the_host_what_is_written() -> None:
    found = {phase.name: phase for phase in phases(job(), MACHINE, Layout("host", separate=True))}["units"]
    assert found.host["activations"] == 8_000 * (2 * 64 + 1024)
    assert "unit 0" in found.device and "unit 0" not in found.host
    assert found.device["activations"] == 4 * 1_000 * (2 * 64 + 1024)
