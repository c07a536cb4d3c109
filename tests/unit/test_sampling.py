# SPDX-License-Identifier: Apache-2.0
"""Some samples of many: as many as asked, evenly spread, in order, and not in step with a set that repeats."""

from __future__ import annotations

import pytest

from modelslim.sampling import choose_samples


@pytest.mark.parametrize(("number", "most"), [(72, 32), (72, 71), (10, 1), (7, 3), (1000, 128)])
def test_one_from_each_part_in_order(number: int, most: int) -> None:
    chosen = choose_samples(range(number), most)
    assert len(chosen) == most
    for index, one in enumerate(chosen):
        assert index * number // most <= one < (index + 1) * number // most
    assert chosen == choose_samples(range(number), most)


@pytest.mark.parametrize("most", [72, 100])
def test_all_when_they_are_not_too_many(most: int) -> None:
    assert choose_samples(range(72), most) == range(72)


@pytest.mark.parametrize("period", range(2, 9))
def test_no_kind_has_far_more_than_its_share_in_a_set_that_repeats(period: int) -> None:
    """Every second of a set of two kinds that take turns would be of one kind."""
    for step in (2, 3, 4, 6):
        chosen = choose_samples(range(128 * step), 128)
        for kind in range(period):
            share = sum(one % period == kind for one in chosen) / 128
            assert share == pytest.approx(1 / period, abs=0.13)
