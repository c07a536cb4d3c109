# SPDX-License-Identifier: Apache-2.0
"""Some samples of many, evenly spread and out of step with any order that repeats; and how long they are."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

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


def tokens_of(value: Any) -> int:
    """How many tokens a model input holds, about: of its integer tensors the longest."""
    if isinstance(value, Tensor):
        return 0 if value.is_floating_point() else value.numel()
    if isinstance(value, Mapping):
        value = list(value.values())
    return max(map(tokens_of, value), default=0) if isinstance(value, (list, tuple)) else 0
