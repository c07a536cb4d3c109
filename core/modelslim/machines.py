# SPDX-License-Identifier: Apache-2.0
"""How fast machines are: the CPU at hand is timed for a tenth of a second, for others there are constants."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from modelslim.costs import Machine
from modelslim.devices import is_host, one_thread

if TYPE_CHECKING:
    from torch import Tensor

CPU = Machine(
    name="2 cores with bfloat16 matrix units",
    macs=0.45e12,
    float32_macs=0.09e12,
    rounded=0.6e9,
    read=1.5e9,
    written=0.8e9,
    copied=5e9,
    passed=1.4e9,
)
"""The machine on which docs/scale.md was measured: ``python benchmarks/scale.py --measure``."""

ACCELERATOR = Machine(
    name="accelerator of 2022 and later",
    macs=150e12,
    float32_macs=20e12,
    rounded=50e9,
    read=2e9,
    written=1e9,
    copied=20e9,
    passed=100e9,
    exchanged=50e9,
    devices_per_host=8,
)
"""Assumed, not measured: a third of what such devices claim for bfloat16, disks and links of common hosts."""


def machine_of(device: str) -> Machine:
    """What to expect of the machine at hand; its disk is assumed."""
    return measured() if is_host(device) else ACCELERATOR


@cache
def measured() -> Machine:
    """The CPU's rates, timed once in a process. Short, so that what else runs on the machine shows in them."""
    import torch

    rows, size = 512, 1024  # rows enough that waking the threads counts little
    x, weight = torch.ones(rows, size, dtype=torch.bfloat16), torch.ones(size, size, dtype=torch.bfloat16)
    a = torch.ones(size, size)
    values = torch.linspace(-1, 1, 1 << 20, dtype=torch.bfloat16).view(1024, 1024)
    source, target = torch.ones(8 << 20, dtype=torch.uint8), torch.empty(8 << 20, dtype=torch.uint8)
    with torch.no_grad():
        passed = _CHANNELS * values.numel() / _seconds(lambda: _pass(values))
        macs = rows * size * size / _seconds(lambda: x @ weight.t())
        float32_macs = rows * size * size / _seconds(lambda: a[:rows] @ a)
        copied = len(source) / _seconds(lambda: target.copy_(source))
        with one_thread():
            rounded = values.numel() / _seconds(lambda: _round(values))
    return replace(
        CPU, name="this CPU", macs=macs, float32_macs=float32_macs, copied=copied, rounded=rounded, passed=passed
    )


def _round(values: Tensor) -> Tensor:
    """As weights are rounded to nearest; the result must be used, or nothing need be computed."""
    import torch

    rows = values.to(torch.float32)
    scale = torch.maximum(rows.amax(1), -rows.amin(1)) / 127
    return rows.div_(scale.unsqueeze(1)).round_().to(torch.int8)


_CHANNELS = 4
"""Channels of a unit, inputs and outputs of its linears, that cost as much as one in ``_pass``; as measured."""


def _pass(x: Tensor) -> Tensor:
    """A norm, as models compute it, and a gate."""
    import torch

    wide = x.to(torch.float32)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return torch.nn.functional.silu(normed) * x


def _seconds(work: Callable[[], object], most: float = 0.025) -> float:
    """The best time of some repetitions, the first of which warms up."""
    work()
    best, end = float("inf"), time.perf_counter() + most
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
