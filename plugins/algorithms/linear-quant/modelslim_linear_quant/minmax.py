# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest of weights on the range of their values (min-max).

The formulas are those of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018), section 2, with an offset instead of a zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.api import QuantizedTensor, TensorSpec, one_thread, range_to_scale

_BLOCK = 1 << 20  # values worked on at once: 4 MiB of float32 stay in the cache


class WeightRounder:
    """Rounds weights; keeps one float32 buffer, since fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def quantize(self, weight: Tensor, spec: TensorSpec) -> QuantizedTensor:
        """Quantize a weight.

        Args:
            weight: [out, in] or, of fused experts, [experts, out, in]; floating, finite.
            spec: ``per_channel`` or ``per_group``; the group size divides ``in``.

        Returns:
            codes int8 of the weight's shape; scale float32 and offset int8 [out, groups], with the
            experts in front.
        """
        codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        # Rows do not know of each other, so those of all experts are one batch.
        flat, flat_codes = weight.flatten(0, -2), codes.flatten(0, -2)
        rows, columns = flat.shape
        step = max(1, _BLOCK // columns)
        with one_thread():
            parts = [
                self._round(flat[start : start + step], flat_codes[start : start + step], spec)
                for start in range(0, rows, step)
            ]
        scale = torch.cat([scale for scale, _ in parts]).view(*weight.shape[:-1], -1)
        offsets = [offset for _, offset in parts if offset is not None]
        offset = torch.cat(offsets).view(scale.shape) if offsets else None
        return QuantizedTensor(codes, scale, offset, spec)

    def _round(self, weight: Tensor, codes: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
        """Round a block of rows into ``codes``; returns its scale and offset."""
        rows, columns = weight.shape
        values = self._values(weight)
        values.copy_(weight)
        groups = values.view(rows, -1, spec.group_size or columns)
        # Reductions over float32 are vectorized, those over bfloat16 are not.
        scale, offset = range_to_scale(groups.amin(-1), groups.amax(-1), spec)
        groups.div_(scale.unsqueeze(-1)).round_()
        if offset is not None:
            groups.add_(offset.unsqueeze(-1))
        # Symmetric codes are within range by construction, also with a scale that was rounded to
        # bfloat16: 127 * (1 + 2**-8) < 127.5.
        if offset is not None:
            groups.clamp_(spec.qmin, spec.qmax)
        codes.copy_(values)
        return scale, offset

    def _values(self, weight: Tensor) -> Tensor:
        if self._scratch.numel() < weight.numel() or self._scratch.device != weight.device:
            self._scratch = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
        return self._scratch[: weight.numel()].view(weight.shape)
