# SPDX-License-Identifier: Apache-2.0
"""Where the descent begins: ranges that suit the inputs, and values that make up for the rounding of others.

The fewer steps, the more the start counts. ``mse`` tries shares of each range and keeps the one with
the least error of the output, inputs taken as uncorrelated. ``gptq`` goes on from there: it visits the
columns of a weight from the one with the largest inputs to that with the smallest and moves what is
not rounded yet so that it makes up for the errors so far (Frantar et al., "GPTQ", 2022, in the form of
Chee et al., "QuIP", 2023). Its moved values are what the offsets then push over to another code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelslim.api import TensorSpec, not_finite, one_thread, range_to_scale

RATIOS = tuple(1 - 0.03 * index for index in range(20))
"""The shares of the full range that are tried."""

_BLOCK = 1 << 18  # values worked on at once on the CPU: a few float32 copies stay in the cache
_COLUMNS = 64  # rounded between two updates of the rest
_DAMPING = 0.01  # of the mean of the diagonal
_MOST_DAMPING = 1e4


def best_ratios(weight: Tensor, spec: TensorSpec, energy: Tensor) -> Tensor:
    """The share of each range that makes the squared error of the output smallest.

    Args:
        weight: [out, in] or [experts, out, in]; floating, finite.
        spec: ``per_channel`` or ``per_group``.
        energy: float32 [in] or [experts, in], the sum of squares of each input.

    Returns:
        float32 [rows, groups], rows of all experts in one; of equal ones the widest.
    """
    size = spec.group_size or weight.shape[-1]
    # Inputs that saw no token count alike; of the others only ratios count.
    mean = energy.mean(-1, keepdim=True)
    counts = torch.where(mean > 0, energy / mean.clamp(min=1e-30), 1.0)
    results = []
    with one_thread():
        for values, count in zip(weight.view(-1, *weight.shape[-2:]), counts.view(-1, counts.shape[-1]), strict=True):
            for block in values.split(max(1, _BLOCK // values.shape[-1]) if values.is_cpu else len(values)):
                rows = block.to(torch.float32).unflatten(-1, (-1, size))
                results.append(_search(rows, spec, count.view(-1, size)))
    return torch.cat(results)


def _search(values: Tensor, spec: TensorSpec, counts: Tensor) -> Tensor:
    low, high = values.amin(-1), values.amax(-1)
    best = least = torch.full_like(low, torch.inf)
    for ratio in RATIOS:
        scale, offset = range_to_scale(low * ratio, high * ratio, spec)
        exact = values / scale.unsqueeze(-1)
        steps = exact.round()
        if offset is None:
            steps.clamp_(spec.qmin, spec.qmax)
        else:
            whole = offset.unsqueeze(-1).to(torch.float32)
            steps.clamp_(spec.qmin - whole, spec.qmax - whole)
        error = steps.sub_(exact).square_().mul_(counts).sum(-1) * scale.square()
        best = torch.where(error < least, ratio, best)
        least = torch.minimum(error, least)
    return best.clamp(max=1.0)


@dataclass
class Factor:
    """A Gram matrix, factored: in the order of ``order`` it is ``U diag U^T``, U unit upper triangular.

    Attributes:
        order: int64 [in], columns by falling energy.
        upper: float32 [in, in], U transposed.
    """

    order: Tensor
    upper: Tensor


def factor(gram: Tensor, linear: str) -> Factor:
    """Factor the Gram matrix float32 [in, in] of a linear's inputs.

    Raises:
        QuantizationError: it is not finite.
    """
    diagonal = gram.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    sorted_gram = gram[order][:, order]
    mean = diagonal.mean().clamp(min=1e-30)
    damping = _DAMPING
    while True:
        damped = sorted_gram + torch.eye(len(gram), device=gram.device) * (mean * damping)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed.item() and bool(lower.isfinite().all()):
            break
        damping *= 10
        if damping > _MOST_DAMPING:
            raise not_finite(linear)
    upper = lower.flip(0, 1).t().contiguous()
    return Factor(order, upper / upper.diagonal().unsqueeze(1))


def moved_values(weight: Tensor, factored: Factor, scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> Tensor:
    """The values that gptq rounds.

    Args:
        weight: [out, in].
        factored: the Gram matrix of the inputs.
        scale, offset: [out, groups].
        spec: the scheme.

    Returns:
        float32 [out, in].
    """
    order, upper = factored.order, factored.upper
    columns = weight.shape[1]
    size = spec.group_size or columns
    group = order // size
    values = weight.t()[order].to(torch.float32)
    scales = scale.t()[group]
    low: Tensor | None = None
    high: Tensor | None = None
    if offset is not None:
        whole = offset.t()[group].to(torch.float32)
        low, high = spec.qmin - whole, spec.qmax - whole
    errors, moved = torch.zeros_like(values), torch.empty_like(values)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        ahead = torch.addmm(values[start:stop], upper[start:stop, :start], errors[:start])
        for column in range(start, stop):
            value = torch.addmv(ahead[column - start], errors[start:column].t(), upper[column, start:column])
            steps = (value / scales[column]).round_()
            if low is None or high is None:
                steps.clamp_(spec.qmin, spec.qmax)
            else:
                steps.clamp_(low[column], high[column])
            moved[column] = value
            torch.addcmul(values[column], steps, scales[column], value=-1, out=errors[column])
    result = torch.empty_like(moved)
    result[order] = moved
    return result.t()
