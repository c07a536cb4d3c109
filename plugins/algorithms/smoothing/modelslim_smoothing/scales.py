# SPDX-License-Identifier: Apache-2.0
"""The formulas of smoothing scales; a tensor ``x`` becomes ``x / s``, and the weights that read it ``W * s``.

Symbols: ``a`` is a magnitude of each channel of the activations, ``w`` of each column of the weights.
All in float32, over the last dimension; dimensions in front (exponents of a search, experts) broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-5
"""Smallest magnitude of a weight column that counts, and smallest scale where no other is asked for."""


def balance(a: Tensor, w: Tensor, alpha: Tensor | float, beta: Tensor | float, smallest: float = TINY) -> Tensor:
    """``s = a^alpha / w^beta`` (SmoothQuant, equation 4, where ``beta = 1 - alpha``).

    Args:
        a: [..., channels], at least 0 and finite.
        w: [..., channels], at least 0 and finite; what is smaller than ``TINY`` counts as ``TINY``.
        alpha, beta: exponents; tensors broadcast against ``a`` and ``w``.
        smallest: lower bound of the scale.

    Returns:
        positive and finite; 1 for channels that are dead (``a`` is 0).
    """
    a, w = a.to(torch.float32), w.to(torch.float32).clamp(min=TINY)
    return _alive(a, a.pow(alpha) / w.pow(beta), smallest)


def salient(a: Tensor, ratio: Tensor | float, smallest: float = 1e-4) -> Tensor:
    """``s = a^ratio`` (AWQ, equation 4), divided by ``sqrt(max(s) * min(s))`` so that it lies around 1.

    Args:
        a: [..., channels], mean magnitudes, at least 0 and finite.
        ratio: exponents; tensors broadcast against ``a``.
        smallest: lower bound of the scale before the division.

    Returns:
        positive and finite; 1 for channels that are dead (``a`` is 0).
    """
    a = a.to(torch.float32)
    s = a.pow(ratio).clamp(min=smallest)
    alive = a > 0
    infinite = torch.full_like(s, torch.inf)
    # Dead channels must not decide where the others lie.
    least = torch.where(alive, s, infinite).amin(-1, keepdim=True)
    most = torch.where(alive, s, -infinite).amax(-1, keepdim=True)
    # Two roots: the product of the two could leave the range of float32.
    return _alive(a, s / (least.sqrt() * most.sqrt()), TINY)


def centre(low: Tensor, high: Tensor) -> Tensor:
    """``(high + low) / 2``, the shift that makes the range of each channel symmetric (Outlier Suppression+)."""
    return low.to(torch.float32) / 2 + high.to(torch.float32) / 2


def per_source(scale: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """One scale for each key/value channel: the mean over the attention heads that share it.

    Args:
        scale: [..., attention heads * size].
        heads: attention heads and key/value heads; None where no head is shared.

    Returns:
        [..., key/value heads * size].
    """
    return scale if heads is None else _grouped(scale, heads).mean(-2).flatten(-2)


def per_target(scale: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """The way back: every attention head gets the scale of its key/value head.

    Args:
        scale: [..., key/value heads * size].
        heads: attention heads and key/value heads; None where no head is shared.

    Returns:
        [..., attention heads * size].
    """
    if heads is None:
        return scale
    grouped = scale.view(*scale.shape[:-1], heads[1], -1)
    return grouped.repeat_interleave(heads[0] // heads[1], -2).flatten(-2)


def largest_per_source(values: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """As ``per_source``, with the maximum in place of the mean."""
    return values if heads is None else _grouped(values, heads).amax(-2).flatten(-2)


def limit(scale: Tensor, source: Tensor, target: Tensor, dtype: torch.dtype, smallest_step: float = 0.0) -> Tensor:
    """The scale, kept so near to 1 that what is folded stays within the normal numbers of its dtype.

    Args:
        scale: [..., channels].
        source, target: [..., channels], largest magnitudes of what is divided and of what is multiplied.
        dtype: of the weights.
        smallest_step: what is divided must stay above this too.

    Returns:
        between ``low`` and ``high``; 1 is always between them.
    """
    info = torch.finfo(dtype)
    # In float32 as well: the scale itself is float32, whatever the weights are.
    least = max(2 * info.tiny, 2 * torch.finfo(torch.float32).tiny)
    most = min(info.max, torch.finfo(torch.float32).max) / 4
    source, target = source.to(torch.float32), target.to(torch.float32)
    one = torch.ones_like(source)
    low = torch.maximum(source / most, torch.where(target > 0, least / target, 0 * one))
    high = torch.minimum(
        torch.where(target > 0, most / target, most * one),
        torch.where(source > 0, source / max(least, smallest_step), most * one),
    )
    return scale.clamp(low.clamp(max=1), high.clamp(min=1))


def _grouped(values: Tensor, heads: tuple[int, int]) -> Tensor:
    """[..., key/value heads, attention heads that share one, size]."""
    return values.view(*values.shape[:-1], heads[1], heads[0] // heads[1], -1)


def _alive(a: Tensor, scale: Tensor, smallest: float) -> Tensor:
    largest = torch.finfo(torch.float32).max / 4
    return torch.where(a > 0, scale.clamp(smallest, largest), torch.ones_like(scale))
