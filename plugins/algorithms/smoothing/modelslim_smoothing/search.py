# SPDX-License-Identifier: Apache-2.0
"""Searches for the exponent of a scale by the error that rounding leaves in the outputs of the linears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelslim.api import ALONE, ExpertLinear, QuantSpec, Ranks, UnitStatistics
from modelslim_smoothing.rounding import round_input, round_weight
from modelslim_smoothing.site import Site

# What takes part in a trial; more costs time and says the same.
_EXPERTS = 8  # of a layer
_LINEARS = 16  # that read one tensor: experts that are modules of their own are many
_OUTPUTS = 256  # of a linear
_TOKENS = 128
_BLOCK = 1 << 20  # values worked on at once: 4 MiB of float32 stay in the cache


@dataclass(frozen=True)
class Trial:
    """Linears that read one tensor, and some tokens of it.

    Attributes:
        x: float32 [tokens, channels].
        low, high: float32 [channels], the ranges over all tokens of the calibration.
        weight: float32 [rows of all linears, channels].
        expert: number of the expert that has the tensor for itself, else None.
        outputs: ``x @ weight.T`` in float.
        importance: [rows], one over the sum of squares of the outputs of the linear that the row belongs to.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor
    expert: int | None
    outputs: Tensor
    importance: Tensor


def trials(site: Site, statistics: UnitStatistics) -> list[Trial]:
    """What is judged at a site: all linears that read the tensor, some of the experts."""
    low, high = site.ranges(statistics)
    rows = site.rows(statistics)
    if not site.per_expert:
        judged = list(site.judged.values())
        weights = [part for number in _spread(range(len(judged)), _LINEARS) for part in _matrices(judged[number])]
        return [_trial(rows[0], low, high, weights, None)]
    seen = [number for number, x in enumerate(rows) if len(x)]
    return [
        _trial(rows[number], low[number], high[number], [one.weight[number] for one in site.judged.values()], number)  # type: ignore[index]
        for number in _spread(seen, _EXPERTS)
    ]


def search(
    tried: Iterable[Trial], scales: Tensor, spec: QuantSpec, steps: int = 0, ranks: Ranks = ALONE
) -> tuple[int, Tensor]:
    """Find the best of several scales.

    Args:
        tried: where they are judged.
        scales: [grid, channels], or [grid, experts, channels].
        spec: how weights and inputs are going to be quantized.
        steps: see ``round_weight``.
        ranks: who shares the work; all of them search for the same.

    Returns:
        number of the best one, the last of equals; and the relative squared errors, float64 [grid].
    """
    found: list[Tensor | None] = []
    for trial in tried:
        own = scales if trial.expert is None else scales[:, trial.expert]
        parts = torch.split(own, _at_once(trial))
        turn = range(len(found), len(found) + len(parts))
        found += [
            errors(trial, part, spec, steps).to("cpu", torch.float64) if number % ranks.size == ranks.rank else None
            for number, part in zip(turn, parts, strict=True)
        ]
    everywhere = ranks.gather(found)
    done = [everywhere[number % ranks.size][number].to("cpu") for number in range(len(found))]
    total = torch.cat(done).view(-1, len(scales)).sum(0) if done else torch.zeros(len(scales), dtype=torch.float64)
    best = len(total) - 1 - int(total.flip(0).argmin())
    return best, total


def errors(trial: Trial, scales: Tensor, spec: QuantSpec, steps: int = 0) -> Tensor:
    """Squared error of ``Q(x / s) Q(W s)^T`` over that of ``x W^T``, summed over the linears.

    Args:
        trial: the linears and the tokens.
        scales: [grid, channels].
        spec: how both are quantized.
        steps: see ``round_weight``.

    Returns:
        [grid].
    """
    found = []
    for s in torch.split(scales, _at_once(trial)):
        weight = round_weight(trial.weight * s.unsqueeze(-2), spec.weight, steps)
        x = round_input(trial.x / s.unsqueeze(-2), trial.low / s, trial.high / s, spec.activation)
        difference = x @ weight.transpose(-1, -2) - trial.outputs
        found.append(difference.square_().sum(-2) @ trial.importance)
    return torch.cat(found)


def _at_once(trial: Trial) -> int:
    """How many scales are worked on at once."""
    return max(1, _BLOCK // max(trial.weight.numel(), trial.x.numel()))


def exponents(steps: int, scale: Tensor, *, last: bool = True) -> Tensor:
    """``0, 1 / steps, 2 / steps, ...``, shaped to make a grid in front of a scale.

    Args:
        steps: how fine.
        scale: has the shape of one scale.
        last: True to go on to 1.
    """
    values = torch.arange(steps + last, device=scale.device, dtype=torch.float32) / steps
    return values.view(-1, *[1] * scale.dim())


def _trial(x: Tensor, low: Tensor, high: Tensor, weights: Sequence[Tensor], expert: int | None) -> Trial:
    x = x[_spread(range(len(x)), _TOKENS)]
    weights = [weight[_spread(range(len(weight)), _OUTPUTS)].to(torch.float32) for weight in weights]
    outputs = [x @ weight.t() for weight in weights]
    tiny = torch.finfo(torch.float32).tiny
    importance = [(1 / y.square().sum().clamp(min=tiny)).expand(y.shape[1]) for y in outputs]
    return Trial(x, low, high, torch.cat(weights), expert, torch.cat(outputs, 1), torch.cat(importance))


def _matrices(module: torch.nn.Module) -> list[Tensor]:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, ExpertLinear):
        return [weight[number] for number in _spread(range(module.experts), _EXPERTS)]
    return [weight]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly spread."""
    return list(numbers[:: max(1, -(-len(numbers) // count))])
