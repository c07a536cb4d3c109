# SPDX-License-Identifier: Apache-2.0
"""Linears that compute as their quantized forms will, and let gradients pass to weights and inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelslim.api import ExpertLinear, TensorSpec, range_to_scale
from modelslim_autoround.weight import TrainedWeight


class InputRounding:
    """Rounds an input to codes and back; gradients pass straight.

    Args:
        spec: int8, ``per_token`` or ``per_tensor``, or float for none.
        scale, offset: float32 and int8 [1], or [experts, 1], for static ones.
    """

    def __init__(self, spec: TensorSpec, scale: Tensor | None = None, offset: Tensor | None = None) -> None:
        self._spec = spec
        self.scale = scale
        self.offset = offset

    def __call__(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [..., in] -> the same shape and dtype."""
        if self._spec.is_float:
            return x
        values = x.detach().to(torch.float32)
        offset: Tensor | None
        if self.scale is None or self.offset is None:
            low, high = torch.aminmax(values, dim=-1, keepdim=True)
            scale, offset = range_to_scale(low, high, self._spec)
        else:
            index = slice(None) if expert is None else expert
            scale, offset = self.scale[index], None if self._spec.symmetric else self.offset[index]
        codes = (values / scale).round_()
        if offset is not None:
            codes += offset
        codes.clamp_(self._spec.qmin, self._spec.qmax)
        if offset is not None:
            codes -= offset
        rounded = codes.mul_(scale).to(x.dtype)
        # The value is the rounded one to the bit; x + (rounded - x) would not be.
        return _straight(x, rounded) if x.requires_grad else rounded


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = _Straight.apply(x, rounded)  # type: ignore[no-untyped-call]
    return result


class _Straight(torch.autograd.Function):
    """The second argument forward, the gradient to the first backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SimulatedLinear(nn.Module):
    """Stands for a linear during training.

    Args:
        linear: the original.
        weight: its weight in training.
        rounding: of its input.
    """

    def __init__(self, linear: nn.Linear, weight: TrainedWeight, rounding: InputRounding) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight.value, linear.bias
        self._rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(self._rounding(x), self.weight, self.bias)


class SimulatedExperts(nn.Module):
    """Stands for a linear of fused experts during training.

    Args:
        bank: the original.
        weight: its weight in training.
        rounding: of its input.
    """

    def __init__(self, bank: ExpertLinear, weight: TrainedWeight, rounding: InputRounding) -> None:
        super().__init__()
        self.in_features, self.out_features = bank.in_features, bank.out_features
        self.weight, self.bias = weight.value, bank.bias
        self._rounding = rounding

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """As that of ``ExpertLinear``."""
        parts = []
        beyond = len(x) - sum(counts)
        for expert, rows in enumerate(torch.split(x, [*counts, beyond])[: len(counts)]):
            bias = None if self.bias is None else self.bias[expert]
            if len(rows):
                parts.append(F.linear(self._rounding(rows, expert), self.weight[expert], bias))
        return torch.cat([*parts, x.new_zeros((beyond, self.out_features))])
