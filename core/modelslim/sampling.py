# SPDX-License-Identifier: Apache-2.0
"""Some samples of many: evenly spread, and out of step with any order that repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def choose_samples(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, in their order, one from each of as many equal parts, at random; the same every time.

    Calibration sets often repeat: prose, chat, code, prose, chat, code. Every second or third record of such a set
    may hold twice its share of one kind.
    """
    if len(items) <= most:
        return items
    generator = random.Random(0)
    ends = [index * len(items) // most for index in range(most + 1)]
    return [items[generator.randrange(start, end)] for start, end in pairwise(ends)]
