# SPDX-License-Identifier: Apache-2.0
"""What calibration tells of an input, X^T X, decomposed once for all linears that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelslim.api import Gram, UnitStatistics, seen_gram

DAMPING = 0.01
"""Added to the diagonal, which is 1; tenfold until there is a decomposition."""
_FAINT = 1e-8  # energies below this share of the mean count as this share


@dataclass(frozen=True)
class Hessian:
    """X^T X with every input divided by its norm; of experts all tensors have the experts in front.

    Attributes:
        matrix: float32 [in, in], damping included.
        norms: float32 [in], of the inputs; 1 where no input ever differed from zero.
        order: int64 [in], the columns by falling norm.
        feedback: float32 [in, in], in that order: row j holds what errors of columns before j add to column j.
        damping: float64 [], what was added to the diagonal.
    """

    matrix: Tensor
    norms: Tensor
    order: Tensor
    feedback: Tensor
    damping: Tensor


def decompose(gram: Tensor) -> Hessian:
    """Scale and decompose X^T X.

    With ``H = U diag(d) U^T``, U unit upper triangular, and e the error of a row, the squared error of the output is
    ``e H e^T = sum_j d_j (e U)_j^2``; ``feedback`` is ``U^T`` (Chee et al., "QuIP", 2023).

    Args:
        gram: float32 [in, in] or [experts, in, in], finite.
    """
    energy = gram.diagonal(dim1=-2, dim2=-1)
    mean = energy.mean(-1, keepdim=True)
    norms = torch.where(mean > 0, torch.maximum(energy, _FAINT * mean), 1.0).sqrt()
    matrix = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    order = norms.argsort(dim=-1, descending=True, stable=True)
    damping = torch.full_like(mean[..., 0], DAMPING, dtype=torch.float64)
    # The Cholesky factor of the matrix read backwards is, read backwards, U times the roots of d.
    square = order.flip(-1).unsqueeze(-1).expand(gram.shape)
    while True:
        matrix.diagonal(dim1=-2, dim2=-1).copy_((1 + damping).to(gram.dtype).unsqueeze(-1).expand(norms.shape))
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(matrix.gather(-2, square).gather(-1, square.mT))
        if not failed.any():
            break
        damping = torch.where(failed > 0, damping * 10, damping)
    feedback = root.flip(-2, -1).mT.contiguous()
    feedback /= feedback.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
    return Hessian(matrix, norms, order, feedback, damping)


def gram_of(name: str, statistics: UnitStatistics) -> Tensor:
    """X^T X of a linear's input, float32 [in, in].

    Raises:
        QuantizationError: no token reached the linear, or its input is not finite.
    """
    return seen_gram(statistics.get(name, Gram), name)


def expert_grams(bank: str, statistics: UnitStatistics) -> Sequence[Tensor]:
    """The same of every expert of a layer."""
    return [seen_gram(one, f"{bank}, expert {index}") for index, one in enumerate(statistics.get_experts(bank, Gram))]


def notes(damping: Tensor) -> tuple[str, ...]:
    """For the report: that the damping had to be raised."""
    if not bool((damping > DAMPING).any()):
        return ()
    return (f"the damping was raised from {DAMPING:g} to {float(damping.max()):g}, X^T X being singular",)
