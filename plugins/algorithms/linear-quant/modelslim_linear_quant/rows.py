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
    columns = weight.shape[-1]
    step = max(1, _BLOCK * weight.shape[-2] // weight.numel())
    scales, offsets = [], []
    with one_thread():
        for block in torch.split(weight, step, dim=-2):
            shape = (*block.shape[:-1], -1, spec.group_size or columns)
            scale, offset = find(block.to(torch.float32).reshape(shape))
            scales.append(scale)
            if offset is not None:
                offsets.append(offset)
    return torch.cat(scales, dim=-2), torch.cat(offsets, dim=-2) if offsets else None


def as_counts(energy: Tensor, spec: TensorSpec) -> Tensor:
    """How much the squared error at each input counts.

    Args:
        energy: float32 [in] or [experts, in], the sum of squares of each input; only ratios matter.
        spec: the scheme.

    Returns:
        float32 [..., 1, groups, inputs of a group], to be multiplied with values as ``FindScale`` gets them.
    """
    ratios = energy / energy.mean(-1, keepdim=True).clamp(min=1e-30)
    return ratios.reshape(*ratios.shape[:-1], 1, -1, spec.group_size or ratios.shape[-1])


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
            rounded = round_to_steps(values, flat_scale[part], None if flat_offset is None else flat_offset[part], spec)
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
    steps = (values / scale.unsqueeze(-1)).round_()
    return clip_(steps, None if offset is None else offset.unsqueeze(-1), spec)


def clip_(steps: Tensor, offset: Tensor | None, spec: TensorSpec) -> Tensor:
    """Cut multiples of the scale, in place, to those that a code can mean."""
    if offset is None:
        return steps.clamp_(spec.qmin, spec.qmax)
    whole = offset.to(torch.float32)  # the difference of two int8 would wrap around
    return steps.clamp_(spec.qmin - whole, spec.qmax - whole)


def held(scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and offset as the engine will hold them.

    Args:
        scale: float32, positive.
        offset: whole numbers as float32 within the codes' range, or None when symmetric.
        spec: the scheme.
    """
    if offset is None:
        return range_to_scale(-scale * spec.qmax, scale * spec.qmax, spec)
    return range_to_scale(scale * (spec.qmin - offset), scale * (spec.qmax - offset), spec)
