# SPDX-License-Identifier: Apache-2.0
"""Floating-point numbers with two bits of mantissa, of which there are so few that they compress well."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim_sparse.columns import in_order, round_columns
from modelslim_sparse.hessian import Hessian
from modelslim_sparse.pruning import largest

LONG = 0.02
"""Share of the weights, the largest, that keep all bits of their dtype."""


def short(values: Tensor) -> Tensor:
    """The nearest numbers with two bits of mantissa behind the leading one; ties to even."""
    mantissa, exponent = torch.frexp(values)  # 0.5 <= mantissa < 1
    return torch.ldexp((mantissa * 8).round() / 8, exponent)


def shorten(weight: Tensor, hessian: Hessian, dtype: torch.dtype, rows: list[int]) -> Tensor:
    """Shorten a sparse weight; each column makes up for the errors of those before it.

    Args:
        weight: float32 [out, in] or [experts, out, in]; zeros stay.
        hessian: of its input.
        dtype: what the weight is stored in.
        rows: rows of each matrix in the weight, one above the other; each has its own largest values.

    Returns:
        of this dtype and of the shape of the weight.
    """
    longest = torch.cat([largest(part.abs(), LONG) for part in torch.split(weight, rows, -2)], -2)
    grid = _Grid(in_order(weight != 0, hessian), in_order(longest, hessian), dtype)
    return round_columns(weight, hessian, grid).to(dtype)


class _Grid:
    """Zeros, short numbers and long ones at given places, each bool [..., in, out]."""

    def __init__(self, kept: Tensor, longest: Tensor, dtype: torch.dtype) -> None:
        self._kept = kept
        self._longest = longest
        self._dtype = dtype

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """See ``Grid``."""
        held = values.to(self._dtype).to(torch.float32)
        # Shortened from what the dtype holds: a number too small for it has no bits left to keep.
        brief = short(held).to(self._dtype).to(torch.float32)
        return torch.where(self._longest[..., column, :], held, brief) * self._kept[..., column, :]
