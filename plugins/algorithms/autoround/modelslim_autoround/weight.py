# SPDX-License-Identifier: Apache-2.0
"""A weight whose rounding is trained: offsets V that push values over to the next code, and multipliers of the range.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2023):
``code = clip(round(w / s + V) + offset)``, V in [-0.5, 0.5], ``s`` from the range ``[beta low, alpha high]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modelslim.api import QuantizedTensor, TensorSpec, one_thread, range_to_scale

_BLOCK = 1 << 18  # values worked on at once on the CPU: a few float32 copies stay in the cache
_NARROWEST = 0.3  # of the full range
_WIDEST = 1.2

State = tuple[Tensor, Tensor, Tensor, Tensor]
"""What is rounded, offsets, and multipliers of the range."""


class TrainedWeight:
    """One weight, or those of all experts of a layer.

    Attributes:
        value: the dequantized weight as a leaf of autograd, of the shape and dtype of the original.
        offsets: V, float32 [rows, groups, inputs of a group], rows of all experts in one.
        low_ratio, high_ratio: beta and alpha, float32 [rows, groups].

    Args:
        weight: [out, in] or [experts, out, in]; floating, finite. Not changed.
        spec: ``per_channel`` or ``per_group``.
    """

    def __init__(self, weight: Tensor, spec: TensorSpec) -> None:
        self._spec = spec
        self._shape = weight.shape
        rows = weight.flatten(0, -2).to(torch.float32)
        self._target = rows.view(len(rows), -1, spec.group_size or weight.shape[-1])
        self._low, self._high = self._target.amin(-1), self._target.amax(-1)
        self.low_ratio, self.high_ratio = torch.ones_like(self._low), torch.ones_like(self._low)
        self.offsets = torch.zeros_like(self._target)
        self.value = nn.Parameter(torch.empty_like(weight, memory_format=torch.contiguous_format))
        step = max(1, _BLOCK // weight.shape[-1]) if rows.is_cpu else len(rows)
        self._blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
        self._buffer = torch.empty_like(self._target[:step])

    def start_at(self, low_ratio: Tensor, high_ratio: Tensor, target: Tensor | None = None) -> None:
        """Begin with these multipliers [rows, groups], and round other values than the weight's own.

        Args:
            low_ratio, high_ratio: see above.
            target: float32 of the weight's shape, such as one that makes up for the rounding of others.
        """
        self.low_ratio, self.high_ratio = low_ratio, high_ratio
        if target is not None:
            self._target = target.reshape(self._target.shape)

    def scale(self) -> tuple[Tensor, Tensor | None]:
        """Scale float32 and offset int8 [rows, groups] of the present range."""
        return range_to_scale(self._low * self.low_ratio, self._high * self.high_ratio, self._spec)

    def refresh(self) -> None:
        """Compute ``value`` from offsets and multipliers."""
        scale, offset = self.scale()
        flat = self.value.detach().view(self._target.shape)
        for block, steps in self._steps(scale, offset):
            flat[block].copy_(steps.mul_(scale[block].unsqueeze(-1)))

    def step(self, rate: float, range_rate: float) -> None:
        """Go against the sign of the gradient of ``value``, and forget it.

        Args:
            rate: how far the offsets go; 0 leaves them.
            range_rate: how far the multipliers go; 0 leaves them.
        """
        gradient = self.value.grad
        if gradient is None:  # an expert layer that no token of the batch entered
            return
        flat = gradient.view(self._target.shape)
        if range_rate:
            self._step_range(flat, range_rate)
        if rate:
            with one_thread():
                for block in self._blocks:
                    signs = self._scratch(block).copy_(flat[block]).sign_()
                    self.offsets[block].add_(signs, alpha=-rate).clamp_(-0.5, 0.5)
        self.value.grad = None

    def _step_range(self, gradient: Tensor, rate: float) -> None:
        """The rounding passes gradients straight; beyond the range, ``value`` is the end of the range itself."""
        scale, offset = self.scale()
        low, high = (bound.unsqueeze(-1) for bound in _bounds(scale, offset, self._spec))
        for block, steps in self._steps(scale, offset):
            part = gradient[block].to(torch.float32)
            exact = self._target[block] / scale[block].unsqueeze(-1)
            pushed = exact + self.offsets[block]
            below, above = pushed < low[block] - 0.5, pushed > high[block] + 0.5
            rounding = ((steps - exact) * part).masked_fill_(below | above, 0).sum(-1)
            below, above = (part * below).sum(-1), (part * above).sum(-1)
            if offset is None:
                # Both ends move together: one multiplier, kept twice.
                codes = rounding + self._spec.qmax * above + self._spec.qmin * below
                move = codes.sign_().mul_(rate)
                self.low_ratio[block].sub_(move)
                self.high_ratio[block].sub_(move)
            else:
                share = rounding / (self._spec.qmax - self._spec.qmin)
                self.high_ratio[block].sub_((share + above).sign_(), alpha=rate)
                self.low_ratio[block].add_((below - share).sign_(), alpha=rate)
        self.low_ratio.clamp_(_NARROWEST, _WIDEST)
        self.high_ratio.clamp_(_NARROWEST, _WIDEST)

    def _steps(self, scale: Tensor, offset: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Codes without their offset, block by block, in a buffer that the next block overwrites."""
        low, high = _bounds(scale, offset, self._spec)
        with one_thread():
            for block in self._blocks:
                steps = torch.div(self._target[block], scale[block].unsqueeze(-1), out=self._scratch(block))
                steps.add_(self.offsets[block]).round_()
                if offset is None:
                    steps.clamp_(self._spec.qmin, self._spec.qmax)
                else:
                    steps.clamp_(low[block].unsqueeze(-1), high[block].unsqueeze(-1))
                yield block, steps

    def _scratch(self, block: slice) -> Tensor:
        return self._buffer[: min(block.stop, len(self._target)) - block.start]

    def state(self) -> State:
        """A copy of what is trained."""
        return self._target, self.offsets.clone(), self.low_ratio.clone(), self.high_ratio.clone()

    def restore(self, state: State) -> None:
        """Return to an earlier state."""
        self._target, self.offsets, self.low_ratio, self.high_ratio = state

    def quantized(self) -> QuantizedTensor:
        """Codes, scale and offset of the present state."""
        scale, offset = self.scale()
        codes = torch.empty(self._target.shape, dtype=torch.int8, device=self._target.device)
        for block, steps in self._steps(scale, offset):
            codes[block].copy_(steps if offset is None else steps.add_(offset[block].unsqueeze(-1)))
        shape = (*self._shape[:-1], -1)
        return QuantizedTensor(
            codes.view(self._shape), scale.view(shape), None if offset is None else offset.view(shape), self._spec
        )


def _bounds(scale: Tensor, offset: Tensor | None, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest multiple of the scale that a code can mean, float32 of the shape of ``scale``."""
    whole = torch.zeros_like(scale) if offset is None else offset.to(torch.float32)
    return spec.qmin - whole, spec.qmax - whole
