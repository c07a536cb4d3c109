# SPDX-License-Identifier: Apache-2.0
"""Which weights become zero, and what the others become to make up for them.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (2024): the alternating direction method of
multipliers (ADMM) between the weight V that reproduces the output, and its sparse form Z. With W the weight, H the
Hessian, U the sum of what the two differ by, and rho what a difference costs:

    Z = mask * (V + U),    U = U + V - Z,    V = (W H + rho (Z - U)) (H + rho I)^-1

The mask keeps the largest of |V + rho U|, and not of |V + U| as in the paper: where V and Z agree, rho U is the slope
of the error, so that this is what each weight would best be if it alone could change; U itself grows as rho shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelslim_sparse.hessian import Hessian

ITERATIONS = 20
GROWING = 15
"""Iterations in which weights are chosen, more from one to the next; the others refine what is left."""
RHO = 0.5
"""As a share of the mean diagonal of the Hessian."""


def prune(weight: Tensor, hessian: Hessian, ratio: float, rows: Sequence[int]) -> Tensor:
    """Set a share of the weights to zero and fit the others.

    Args:
        weight: float32 [out, in] or [experts, out, in].
        hessian: of its input.
        ratio: the share, 0 to 1.
        rows: rows of each matrix in the weight, one above the other; each loses its own share.

    Returns:
        float32, of the shape of the weight.
    """
    norms = hessian.norms.unsqueeze(-2)
    wanted = weight * norms
    if not ratio:
        return weight.clone()
    damped = hessian.matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(RHO)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    output = wanted @ hessian.matrix
    dense, sparse, apart = wanted, wanted, torch.zeros_like(wanted)
    mask = torch.ones_like(wanted, dtype=torch.bool)
    for step in range(ITERATIONS):
        total = dense + apart
        if step < GROWING:
            share = ratio * (1 - (1 - (step + 1) / GROWING) ** 3)
            score = torch.add(dense, apart, alpha=RHO).abs_()
            mask = torch.cat([largest(part, 1 - share) for part in torch.split(score, list(rows), -2)], -2)
        sparse = total * mask
        if step + 1 == ITERATIONS:
            break
        apart = total - sparse
        dense = (output + RHO * (sparse - apart)) @ inverse
    return sparse / norms


def largest(values: Tensor, share: float) -> Tensor:
    """Where the largest values of each matrix are.

    Args:
        values: [..., rows, columns].
        share: how many of all; exactly as many are chosen, the first ones of equal values.

    Returns:
        bool, of the same shape.
    """
    flat = values.flatten(-2)
    count = flat.shape[-1]
    left_out = count - round(share * count)
    if not left_out:
        return torch.ones_like(values, dtype=torch.bool)
    bound = flat.kthvalue(left_out, dim=-1, keepdim=True).values
    chosen = flat > bound
    lacking = count - left_out - chosen.sum(-1, keepdim=True)
    if lacking.any():
        equal = flat == bound
        chosen |= equal & (equal.cumsum(-1) <= lacking)
    return chosen.view(values.shape)
