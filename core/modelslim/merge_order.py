# SPDX-License-Identifier: Apache-2.0
"""In which order what samples show is added up, whoever has seen them.

Samples form groups, and neighbouring groups form blocks. Sums are made sample by sample in a group, group by group
in a block, and block by block. A rank that sees all groups of a block sends their sum alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_GROUP = 1024
"""Tokens of a group at least: summing up second moments then costs little beside making them."""
_GROUPS = 64
"""Groups at most."""
_BLOCKS = 8
"""Blocks at most."""


@dataclass(frozen=True)
class MergeOrder:
    """Who sees which samples, and how often ranks tell each other of them.

    Attributes:
        ranks: by rank the rounds, as many at each: in each the groups of the rank, numbers of samples in each.
            In round r all that rank 0 sees comes before what rank 1 sees. Some have nothing to do in the last round.
        ends: with so many of what ranks tell each other, rank by rank and round by round, a block is complete.
    """

    ranks: list[list[list[list[int]]]]
    ends: frozenset[int]


def merge_order(tokens: Sequence[int], size: int) -> MergeOrder:
    """Divide samples among ranks.

    Args:
        tokens: of each sample.
        size: number of ranks.
    """
    enough = max(_GROUP, -(-sum(tokens) // _GROUPS))
    groups: list[list[int]] = [[]]
    weight = 0
    for number, count in enumerate(tokens):
        if weight >= enough:
            groups.append([])
            weight = 0
        groups[-1].append(number)
        weight += count
    count = min(len(groups), _BLOCKS)
    least, more = divmod(len(groups), count)
    starts = [least * number + min(number, more) for number in range(count + 1)]
    blocks = [groups[start:stop] for start, stop in pairwise(starts)]
    # Whole blocks are told of less often, but may divide worse.
    most = max(sum(map(len, blocks[rank::size])) for rank in range(size))
    is_whole = most <= -(-len(groups) // size)
    rounds = blocks if is_whole else [[group] for group in groups]
    ends = range(1, count + 1) if is_whole else starts[1:]
    rounds += [[] for _ in range(-len(rounds) % size)]
    return MergeOrder([rounds[rank::size] for rank in range(size)], frozenset(ends))
