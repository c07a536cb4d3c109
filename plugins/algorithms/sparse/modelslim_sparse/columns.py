# SPDX-License-Identifier: Apache-2.0
"""Columns are rounded one after the other, and each makes up for the errors of those before it, as in GPTQ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from modelslim_sparse.hessian import Hessian

_BLOCK = 128  # columns between two updates of the remaining ones


class Grid(Protocol):
    """The values that a weight may have, by column."""

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The nearest values that are allowed.

        Args:
            values: float32 [..., out], what the column should be.
            column: its place in the order of the Hessian.
        """


def in_order(weight: Tensor, hessian: Hessian) -> Tensor:
    """Columns of [..., out, in] as rows, in the order in which they are rounded: [..., in, out]."""
    rows = weight.mT
    index = hessian.order.unsqueeze(-1).expand(*hessian.order.shape, rows.shape[-1])
    return rows.gather(-2, index)


def round_columns(weight: Tensor, hessian: Hessian, grid: Grid) -> Tensor:
    """Bring a weight onto a grid so that its output changes little.

    Args:
        weight: float32 [out, in] or [experts, out, in].
        hessian: of its input.
        grid: what is allowed; its columns are in the order of the Hessian.

    Returns:
        float32, of the shape of the weight.
    """
    wanted = in_order(weight, hessian)
    norms = hessian.norms.gather(-1, hessian.order)
    values, error = torch.empty_like(wanted), torch.zeros_like(wanted)
    columns = wanted.shape[-2]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # Errors count as those of inputs of norm 1, of which the feedback speaks.
        carried = hessian.feedback[..., start:stop, :start] @ error[..., :start, :]
        for column in range(start, stop):
            within = hessian.feedback[..., column : column + 1, start:column] @ error[..., start:column, :]
            norm = norms[..., column : column + 1]
            target = wanted[..., column, :] + (carried[..., column - start, :] + within[..., 0, :]) / norm
            values[..., column, :] = grid.nearest(target, column)
            error[..., column, :] = (wanted[..., column, :] - values[..., column, :]) * norm
    places = hessian.order.argsort(-1).unsqueeze(-1).expand(wanted.shape)
    return values.gather(-2, places).mT.contiguous()
