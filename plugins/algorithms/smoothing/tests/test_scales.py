# SPDX-License-Identifier: Apache-2.0
"""The formulas against loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from modelslim_smoothing.scales import balance, centre, limit, per_source, per_target, salient


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.exp(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.3, 0.95)])
def test_balance_is_a_to_alpha_over_w_to_beta(alpha: float, beta: float) -> None:
    a, w = numbers(50), numbers(50, seed=1)
    w[:3] = torch.tensor([0.0, 1e-9, 1e-5])
    expected = [
        max(x**alpha / max(y, 1e-5) ** beta, 1e-3)
        for x, y in zip(a.double().tolist(), w.double().tolist(), strict=True)
    ]
    torch.testing.assert_close(balance(a, w, alpha, beta, 1e-3), torch.tensor(expected), rtol=1e-5, atol=0)


def test_balance_of_a_grid_is_that_of_each_exponent() -> None:
    a, w = numbers(4, 6), numbers(4, 6, seed=1)
    grid = torch.tensor([0.0, 0.25, 1.0]).view(-1, 1, 1)
    together = balance(a, w, grid, 1 - grid)
    for number, alpha in enumerate((0.0, 0.25, 1.0)):
        torch.testing.assert_close(together[number], balance(a, w, alpha, 1 - alpha))


@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.95])
def test_salient_is_a_to_the_ratio_around_one(ratio: float) -> None:
    a = numbers(40)
    a[0] = 1e-12
    powers = [max(x**ratio, 1e-4) for x in a.double().tolist()]
    middle = math.sqrt(max(powers) * min(powers))
    expected = torch.tensor([max(power / middle, 1e-5) for power in powers])
    torch.testing.assert_close(salient(a, ratio), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-20, 1e20, 3e38])
def test_scales_are_finite_and_positive_whatever_comes(value: float) -> None:
    a = torch.tensor([value, 1.0, 0.0])
    w = torch.tensor([3e38, 1.0, 1e-38])
    grid = torch.linspace(0, 1, 21).view(-1, 1)
    for scale in (balance(a, w, grid, 1 - grid), balance(a, w, 1.0, grid), salient(a, grid)):
        assert (scale.isfinite() & (scale > 0)).all()
        assert (scale[:, 2] == 1).all()


def test_all_dead_gives_ones() -> None:
    zeros = torch.zeros(5)
    assert torch.equal(balance(zeros, zeros, 0.5, 0.5), torch.ones(5))
    assert torch.equal(salient(zeros, 0.5), torch.ones(5))


def test_dead_channels_do_not_move_the_others() -> None:
    a = numbers(10)
    with_dead = torch.cat([a, torch.zeros(3)])
    torch.testing.assert_close(salient(with_dead, 0.5)[:10], salient(a, 0.5))


def test_centre_is_the_middle_of_the_range() -> None:
    low, high = torch.tensor([-3.0, 1.0, -3e38]), torch.tensor([1.0, 5.0, 3e38])
    assert torch.equal(centre(low, high), torch.tensor([-1.0, 3.0, 0.0]))


@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (6, 6), (6, 3), None])
def test_heads_of_one_group_share_the_mean(heads: tuple[int, int] | None) -> None:
    scale = numbers(3, 24)
    shared = per_source(scale, heads)
    if heads is None:
        assert torch.equal(shared, scale)
        return
    total, groups = heads
    for head in range(total):
        group = head // (total // groups)
        members = [other for other in range(total) if other // (total // groups) == group]
        for channel in range(4):
            mean = sum(scale[:, other * 4 + channel].double() for other in members) / len(members)
            torch.testing.assert_close(shared[:, group * 4 + channel].double(), mean, rtol=1e-6, atol=0)
            assert torch.equal(per_target(shared, heads)[:, head * 4 + channel], shared[:, group * 4 + channel])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_limit_keeps_what_is_folded_within_the_normal_numbers(dtype: torch.dtype) -> None:
    source, target = numbers(200).to(dtype).float(), numbers(200, seed=1).to(dtype).float()
    source[:2], target[2:4] = 0, 0
    for wanted in (1e-5, 1e-2, 1.0, 1e3, 1e9, 1e37):
        scale = limit(torch.full((200,), wanted), source, target, dtype)
        for folded, before in (((source / scale).to(dtype), source), ((target * scale).to(dtype), target)):
            assert folded.isfinite().all()
            least = before.clamp(max=torch.finfo(dtype).tiny)  # no worse than it was
            assert (folded.float() >= least).all()


def test_limit_leaves_alone_what_fits() -> None:
    scale = numbers(50)
    assert torch.equal(limit(scale, torch.ones(50), torch.ones(50), torch.bfloat16), scale)


def test_one_is_always_within_the_limits() -> None:
    extremes = torch.tensor([0.0, 6e-8, 65504.0])
    source, target = (one.flatten() for one in torch.meshgrid(extremes, extremes, indexing="ij"))
    assert torch.equal(limit(torch.ones(9), source, target, torch.float16), torch.ones(9))
