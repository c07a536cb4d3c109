# SPDX-License-Identifier: Apache-2.0
"""What methods that look for a better scale share: rows in blocks that fit the cache, and rounding to codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, one_thread, range_to_scale

_BLOCK = 1 << 18  # values worked on at once: a few float32 copies stay in the cache

FindScale = Callable[[Tensor], tuple[Tensor, "Tensor | None"]]
"""From values float32 [..., rows, groups, inputs of a group] to scale and offset [..., rows, groups]."""


def find_scales(weight: Tensor, spec: TensorSpec, find: FindScale) -> tuple[Tensor, Tensor | None]:
    """Find the scales of a weight, some rows at a time.

    Args:
        weight: [out, in] or [experts, out, in]; floating.
        spec: ``per_channel`` or ``per_group``.
        find: does it for a block of rows, of all experts at once.

    Returns:
        scale float32 and offset int8, or None when symmetric: [out, groups], with the experts in front.
    """
    *experts, rows, columns = weight.shape
    step = max(1, _BLOCK // (columns * (experts[0] if experts else 1)))
    scales, offsets = [], []
    with one_thread():
        for block in weight.split(step, dim=-2):
            shape = (*block.shape[:-1], -1, spec.group_size or columns)
            scale, offset = find(block.to(torch.float32).reshape(shape))
            scales.append(scale)
            if offset is not None:
                offsets.append(offset)
    return torch.cat(scales, dim=-2), torch.cat(offsets, dim=-2) if offsets else None


def round_weight(weight: Tensor, scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> QuantizedTensor:
    """Round a weight to nearest with the scales that were found."""
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    columns = weight.shape[-1]
    flat, flat_codes = weight.flatten(0, -2), codes.flatten(0, -2)
    flat_scale, flat_offset = scale.flatten(0, -2), None if offset is None else offset.flatten(0, -2)
    step = max(1, _BLOCK // columns)
    with one_thread():
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            values = flat[part].to(torch.float32).reshape(*flat_scale[part].shape, -1)
            rounded = round_to_steps(
                values, flat_scale[part], None if flat_offset is None else flat_offset[part], spec
            )
            if flat_offset is not None:
                rounded += flat_offset[part].unsqueeze(-1)
            flat_codes[part] = rounded.view(-1, columns).to(torch.int8)
    return QuantizedTensor(codes, scale, offset, spec)


def round_to_steps(values: Tensor, scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> Tensor:
    """Codes without their offset, as floats: whole multiples of the scale, within the codes' range.

    Args:
        values: float32 [..., groups, inputs of a group].
        scale, offset: [..., groups].
        spec: the scheme.
    """
    low, high = bounds(offset, spec)
    steps = (values / scale.unsqueeze(-1)).round_()
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return steps.clamp_(low.unsqueeze(-1), high.unsqueeze(-1))
    return steps.clamp_(low, high)


def bounds(offset: Tensor | None, spec: TensorSpec) -> tuple[Tensor, Tensor] | tuple[int, int]:
    """Smallest and largest multiple of the scale that a code can mean; float32 of the offset's shape."""
    if offset is None:
        return spec.qmin, spec.qmax
    whole = offset.to(torch.float32)
    return spec.qmin - whole, spec.qmax - whole


def held(scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and offset as the engine will hold them.

    Args:
        scale: float32, positive.
        offset: whole numbers as float32 within the codes' range, or None when symmetric.
        spec: the scheme.
    """
    low, high = bounds(offset, spec)
    if offset is None:
        low = -spec.qmax
    return range_to_scale(scale * low, scale * high, spec)
