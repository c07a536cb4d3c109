# SPDX-License-Identifier: Apache-2.0
"""Sums have the same bits for any number of ranks, up to more than there are blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.merge_order import merge_order
from modelslim.ports import PortCollector
from modelslim.ranks import Ranks
from modelslim.row_sample import RowSample
from modelslim.runners.stream import Stream
from modelslim.statistics import ChannelEnergy, Gram, TensorRange

CHANNELS = 24
KINDS = frozenset({Gram, ChannelEnergy, TensorRange, RowSample})


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("count", [1, 3, 9, 20, 41, 100])
def test_each_sample_is_seen_once_and_in_order(count: int, size: int) -> None:
    tokens = [300 + 700 * (number % 3) for number in range(count)]
    order = merge_order(tokens, size)
    assert len(order.ranks) == size
    (rounds,) = {len(one) for one in order.ranks}
    seen = [group for number in range(rounds) for one in order.ranks for group in one[number]]
    assert [number for group in seen for number in group] == list(range(count))
    alone = merge_order(tokens, 1)
    assert seen == [group for groups in alone.ranks[0] for group in groups]
    blocks = [len(groups) for groups in alone.ranks[0]]
    parts = [len(one[number]) for number in range(rounds) for one in order.ranks]
    ends = sorted(order.ends)
    assert [sum(parts[start:stop]) for start, stop in pairwise([0, *ends])] == blocks
    assert not any(parts[ends[-1] :])


def test_there_are_few_blocks_however_many_samples_there_are() -> None:
    order = merge_order([4096] * 1000, 1)
    assert [len(groups) for groups in order.ranks[0]] == [8] * 7 + [7]
    for size in (2, 4, 8):
        assert len(merge_order([3840] * 26, size).ends) == len(merge_order([3840] * 26, 1).ends) == 8
        assert max(merge_order([3840] * 26, size).ends) == 8  # whole blocks
    many = merge_order([4096] * 1000, 64)
    assert max(sum(map(len, rounds)) for rounds in many.ranks) == 1  # and all of many ranks have something to do


@dataclass(frozen=True)
class Seated(Ranks):
    """A rank that is a thread, and shares a table with the others."""

    table: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(60)
        found = [value if rank == self.rank else deepcopy(one) for rank, one in enumerate(self.table)]
        self.barrier.wait(60)
        return found


class Shown:
    """Stands for the samples at a unit that is one linear."""

    def __init__(self, linear: nn.Module, samples: Sequence[Tensor]) -> None:
        self.linear = linear
        self.samples = samples

    def run_unit(self, unit: str, passed: Callable[[], None], resume: bool, group: Sequence[int]) -> int:
        for index in group:
            self.linear(self.samples[index])
            passed()
        return sum(len(self.samples[index]) for index in group)


def measured(samples: Sequence[Tensor], size: int) -> list[Any]:
    """What rank 0 of so many knows in the end; all must know the same."""
    order = merge_order([len(one) for one in samples], size)
    table: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    found: list[Any] = [None] * size

    def work(rank: int) -> None:
        linear = nn.Linear(CHANNELS, 2)
        numbers = [number for groups in order.ranks[rank] for group in groups for number in group]
        shown: Any = Shown(linear, [samples[number] for number in numbers])
        ranks = Seated(rank, size, table=table, barrier=barrier)
        with torch.no_grad(), PortCollector({"q": linear}, {"q": KINDS}) as ports:
            tokens = Stream(shown, numbers, order, ranks).run("unit", ports)
        statistics = ports.statistics()
        second, energy = statistics.get("q", Gram), statistics.get("q", ChannelEnergy)
        found[rank] = [tokens, statistics.get("q", RowSample).rows, vars(statistics.get("q", TensorRange))]
        found[rank] += [second.matrix, second.total, second.tokens, vars(energy)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for one in found[1:]:
        same(one, found[0])
    result: list[Any] = found[0]
    return result


def same(one: Any, other: Any) -> None:
    """Equal to the bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for part, counterpart in zip(one, other, strict=True):
            same(part, counterpart)
    else:
        assert one == other


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 9, 12])
def test_sums_have_the_same_bits(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [400 + 250 * (number % 4) for number in range(31)]
    samples = [torch.randn(length, CHANNELS, generator=generator) * 10 for length in lengths]
    alone = measured(samples, 1)
    same(measured(samples, size), alone)
    x = torch.cat(samples).double()
    assert alone[0] == len(x)
    assert torch.allclose(alone[3].double(), x.t() @ x, rtol=1e-4, atol=float(x.square().sum()) * 1e-7)
