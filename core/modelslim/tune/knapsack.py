# SPDX-License-Identifier: Apache-2.0
"""One option for every group, the least loss within a budget of bytes: the multiple-choice knapsack."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_STATES = 200_000
"""Partial choices that are kept side by side; beyond that the bound says how far the best found may be off."""


@dataclass(frozen=True)
class Item:
    """An option of a group.

    Attributes:
        cost: bytes.
        loss: what it costs in quality; not negative.
    """

    cost: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
        options: index of the option of every group.
        cost: bytes of all.
        loss: sum of the losses.
        bound: no choice within the budget has a smaller loss than this.
        exact: True when this one is proven to be the best.
    """

    options: Sequence[int]
    cost: int
    loss: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class _Step:
    """A way from one corner of a group's convex hull to the next: more bytes for less loss."""

    group: int
    option: int
    cost: int
    gain: float


@dataclass(frozen=True)
class _State:
    """A choice for the first groups."""

    cost: int
    loss: float
    option: int
    before: _State | None


def solve(groups: Sequence[Sequence[Item]], budget: int) -> Choice | None:
    """The best choice.

    Upgrades along the convex hulls, the most gain per byte first, give a first choice; the fraction of the upgrade
    that no longer fits gives the bound of the linear relaxation. Dynamic programming over the groups then keeps
    every partial choice that no other beats in both bytes and loss and whose own bound is below the best choice
    so far, so what remains at its end is the optimum.

    Args:
        groups: the options of each group; at least one each.
        budget: bytes.

    Returns:
        The choice; None when even the cheapest options exceed the budget.
    """
    hulls = [_hull(items) for items in groups]
    base = sum(items[hull[0]].cost for items, hull in zip(groups, hulls, strict=True))
    if base > budget:
        return None
    steps = sorted(
        (
            _Step(index, new, items[new].cost - items[old].cost, items[old].loss - items[new].loss)
            for index, (items, hull) in enumerate(zip(groups, hulls, strict=True))
            for old, new in pairwise(hull)
        ),
        key=lambda step: -step.gain / step.cost,
    )
    options = [hull[0] for hull in hulls]
    room, closed = budget - base, set()
    for step in steps:
        if step.group not in closed and step.cost <= room:
            options[step.group] = step.option
            room -= step.cost
        else:
            closed.add(step.group)
    loss = sum(items[option].loss for items, option in zip(groups, options, strict=True))
    bound = _relaxed(sum(items[hull[0]].loss for items, hull in zip(groups, hulls, strict=True)), steps, budget - base)
    found, exact = _search(groups, hulls, steps, budget, loss)
    if found is not None:
        options, loss = found, sum(items[option].loss for items, option in zip(groups, found, strict=True))
    cost = sum(items[option].cost for items, option in zip(groups, options, strict=True))
    return Choice(options, cost, loss, loss if exact else min(bound, loss), exact)


def _hull(items: Sequence[Item]) -> list[int]:
    """Options at the lower left convex hull, the cheapest first."""
    hull: list[int] = []
    for index in sorted(range(len(items)), key=lambda one: (items[one].cost, items[one].loss)):
        if hull and items[index].loss >= items[hull[-1]].loss:
            continue
        if hull and items[index].cost == items[hull[-1]].cost:
            continue
        while len(hull) > 1 and _slope(items, hull[-2], hull[-1]) <= _slope(items, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(items: Sequence[Item], old: int, new: int) -> float:
    """Gain per byte of a step."""
    return (items[old].loss - items[new].loss) / (items[new].cost - items[old].cost)


def _relaxed(loss: float, steps: Sequence[_Step], room: int) -> float:
    """The loss when a step may be taken in part, a bound from below."""
    for step in steps:
        if step.cost > room:
            return loss - step.gain * room / step.cost
        loss, room = loss - step.gain, room - step.cost
    return loss


def _search(
    groups: Sequence[Sequence[Item]], hulls: Sequence[Sequence[int]], steps: Sequence[_Step], budget: int, best: float
) -> tuple[list[int] | None, bool]:
    """A choice better than ``best``, None when there is none; and whether the search was complete."""
    # What the groups behind each one cost and lose at least, and the steps that they still offer.
    least = [0.0] * (len(groups) + 1)
    cheapest = [0] * (len(groups) + 1)
    for index in reversed(range(len(groups))):
        first = groups[index][hulls[index][0]]
        least[index], cheapest[index] = least[index + 1] + first.loss, cheapest[index + 1] + first.cost
    states = [_State(0, 0.0, -1, None)]
    exact = True
    for index, items in enumerate(groups):
        behind = [step for step in steps if step.group > index]
        cumulated = _Relaxation(behind)
        grown = sorted(
            (_State(state.cost + item.cost, state.loss + item.loss, number, state)
             for state in states for number, item in enumerate(items)),
            key=lambda state: (state.cost, state.loss),
        )  # fmt: skip
        states = []
        for state in grown:
            room = budget - state.cost - cheapest[index + 1]
            if room < 0 or (states and state.loss >= states[-1].loss):
                continue
            if state.loss + least[index + 1] - cumulated.gain(room) < best * (1 - 1e-12):
                states.append(state)
        if len(states) > MOST_STATES:
            exact = False
            states = states[:: len(states) // MOST_STATES + 1]
        if not states:
            return None, exact
    last: _State | None = min(states, key=lambda state: state.loss)
    options: list[int] = []
    while last is not None and last.before is not None:
        options.append(last.option)
        last = last.before
    return options[::-1], exact


class _Relaxation:
    """The most that steps, sorted by gain per byte, can gain in a room, the last one in part."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._steps = steps
        self._costs = [0]
        self._gains = [0.0]
        for step in steps:
            self._costs.append(self._costs[-1] + step.cost)
            self._gains.append(self._gains[-1] + step.gain)

    def gain(self, room: int) -> float:
        whole = bisect_right(self._costs, room) - 1
        if whole == len(self._steps):
            return self._gains[-1]
        step = self._steps[whole]
        return self._gains[whole] + step.gain * (room - self._costs[whole]) / step.cost
