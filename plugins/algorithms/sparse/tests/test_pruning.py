# SPDX-License-Identifier: Apache-2.0
"""Pruning against exhaustive search, least squares and a plain ADMM, all in double precision."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from modelslim_sparse.hessian import DAMPING, decompose
from modelslim_sparse.pruning import GROWING, ITERATIONS, RHO, largest, prune


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def gram(columns: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Of correlated inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = mixed * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]
    return x.t() @ x


def error(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    away = (weight - sparse).double()
    return float((away @ hessian.double() * away).sum())


def least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The best values of what is kept, row by row."""
    best = torch.zeros(weight.shape, dtype=torch.float64)
    wide = hessian.double()
    for row, kept in enumerate(mask):
        target = wide[kept] @ weight[row].double()
        best[row, kept] = torch.linalg.solve(wide[kept][:, kept], target)
    return best


def plain_admm(weight: Tensor, hessian: Tensor, ratio: float) -> Tensor:
    """The method as its formulas have it."""
    wide = hessian.double()
    norms = wide.diagonal().sqrt()
    scaled = wide / torch.outer(norms, norms) + DAMPING * torch.eye(len(wide), dtype=torch.float64)
    inverse = torch.linalg.inv(scaled + RHO * torch.eye(len(wide), dtype=torch.float64))
    wanted = weight.double() * norms
    v, u = wanted.clone(), torch.zeros_like(wanted)
    z, mask = wanted, torch.ones_like(wanted, dtype=torch.bool)
    for step in range(1, ITERATIONS + 1):
        if step <= GROWING:
            zeros = wanted.numel() - round((1 - ratio * (1 - (1 - step / GROWING) ** 3)) * wanted.numel())
            order = (v + RHO * u).abs().flatten().argsort()
            mask = torch.ones(wanted.numel(), dtype=torch.bool)
            mask[order[:zeros]] = False
            mask = mask.view(wanted.shape)
        z = (v + u) * mask
        u = u + v - z
        v = (wanted @ scaled + RHO * (z - u)) @ inverse
    return z / norms


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_it_is_the_method_of_the_paper(ratio: float) -> None:
    weight, hessian = random_weight(24, 40), gram(40)
    found = prune(weight, decompose(hessian), ratio, [24])
    expected = plain_admm(weight, hessian, ratio)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_every_matrix_loses_its_share(ratio: float) -> None:
    weight = torch.cat([random_weight(16, 48), 5 * random_weight(32, 48, seed=3)])
    found = prune(weight, decompose(gram(48)), ratio, [16, 32])
    zeros = [int((part == 0).sum()) for part in torch.split(found, [16, 32])]
    assert zeros == [size - round((1 - ratio) * size) for size in (16 * 48, 32 * 48)]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_output_is_nearer_than_by_magnitude_and_by_magnitude_times_input(ratio: float) -> None:
    weight, hessian = random_weight(64, 96), gram(96)
    found = error(weight, prune(weight, decompose(hessian), ratio, [64]), hessian)
    plain = error(weight, weight * largest(weight.abs(), 1 - ratio), hessian)
    scored = largest((weight * hessian.diagonal().sqrt()).abs(), 1 - ratio)
    assert found < 0.2 * plain
    assert found < 0.6 * error(weight, weight * scored, hessian)
    # The mask is better, too, and not only the values on it.
    assert found < error(weight, least_squares(weight, scored, hessian), hessian)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_values_are_almost_the_best_ones_for_what_is_kept(ratio: float) -> None:
    weight, hessian = random_weight(32, 64), gram(64)
    found = prune(weight, decompose(hessian), ratio, [32])
    best = error(weight, least_squares(weight, found != 0, hessian), hessian)
    assert error(weight, found, hessian) < 1.1 * best


def test_choice_is_near_the_best_of_all_choices() -> None:
    """One row of ten inputs, of which three go: 120 choices, each with its best values."""
    found = best = 0.0
    for seed in range(20):
        weight, hessian = random_weight(1, 10, seed=seed), gram(10, seed=seed + 50)
        found += error(weight, prune(weight, decompose(hessian), 0.3, [1]), hessian)
        options = []
        for gone in combinations(range(10), 3):
            mask = torch.ones(1, 10, dtype=torch.bool)
            mask[0, list(gone)] = False
            options.append(error(weight, least_squares(weight, mask, hessian), hessian))
        best += min(options)
    assert found < 2 * best


def test_inputs_that_are_always_zero_go_first() -> None:
    hessian = gram(40)
    hessian[::4], hessian[:, ::4] = 0, 0
    found = prune(random_weight(16, 40), decompose(hessian), 0.3, [16])
    assert not found[:, ::4].any()
    assert found.isfinite().all()


def test_input_without_any_energy_leaves_plain_magnitudes() -> None:
    weight = random_weight(16, 40)
    found = prune(weight, decompose(torch.zeros(40, 40)), 0.5, [16])
    assert torch.equal(found != 0, largest(weight.abs(), 0.5))
    torch.testing.assert_close(found, weight * (found != 0), rtol=1e-2, atol=0)


def test_equal_values_do_not_all_go() -> None:
    chosen = largest(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), 0.5)
    assert chosen.tolist() == [[True, True, True], [False, False, False]]
    assert int(largest(torch.ones(3, 10, 10), 0.3).sum()) == 90
    assert not largest(torch.rand(4, 4), 0.0).any()
