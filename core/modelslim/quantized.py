# SPDX-License-Identifier: Apache-2.0
"""The narrow waist: what algorithms produce and savers store.

Everything before it knows no file format, everything behind it does no quantization. The forward
computes what an engine computes from the same numbers: integer products summed in 32 bits,
activation scales per token where the spec says per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelslim.devices import has_integer_matmul
from modelslim.types import QuantSpec, TensorSpec


@dataclass
class QuantizedTensor:
    """An integer weight.

    Attributes:
        codes: int8 [out, in]; a 4-bit code occupies one byte, -8..7.
        scale: float32 [out, groups]; groups is 1 for ``per_channel``.
        offset: int8 [out, groups], or None when symmetric.
        spec: how it was quantized.

    Weights of fused experts have one more dimension in front: [experts, out, in] and so on.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    spec: TensorSpec

    def dequantize(self) -> Tensor:
        """``(codes - offset) * scale`` in float32, of the shape of the codes."""
        values = self.codes.view(*self.scale.shape, -1).to(torch.float32)
        if self.offset is not None:
            values = values - self.offset.unsqueeze(-1)
        return (values * self.scale.unsqueeze(-1)).view(self.codes.shape)


class QuantizedLinear(nn.Module):
    """A linear whose weight is integer and whose input is quantized as its spec says.

    Args:
        weight: the integer weight.
        spec: schemes of weight and activation.
        bias: [out] of any floating dtype, or None.
        input_scale: float32 [1], for static activations.
        input_offset: int8 [1], for static activations; zero when symmetric.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None

    def __init__(
        self,
        weight: QuantizedTensor,
        spec: QuantSpec,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        if spec.is_static != (input_scale is not None and input_offset is not None):
            raise ValueError("static activations, and only they, come with input_scale and input_offset")
        self.spec = spec
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_offset", input_offset)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.codes.shape[-1]

    @property
    def weight(self) -> QuantizedTensor:
        """The integer weight."""
        return QuantizedTensor(self.codes, self.scale, self.offset, self.spec.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any floating dtype -> [..., out] of the same dtype."""
        if self.spec.activation.is_float:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.dequantize().to(x.dtype), bias)
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        codes, scale, offset = self._quantize_input(rows)
        if self.scale.shape[1] == 1 and self.offset is None:
            y = integer_matmul(codes, self.codes)
            if offset is not None:
                y = y - offset.to(torch.float32) * self.codes.sum(1, dtype=torch.float32)
            y = y * (scale * self.scale.view(1, -1))
        else:
            values = codes.to(torch.float32)
            if offset is not None:
                values = values - offset
            y = (values * scale) @ self.weight.dequantize().t()
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows float32 [tokens, in] -> codes int8, scale [tokens or 1, 1], offset or None."""
        spec = self.spec.activation
        offset: Tensor | None
        if self.input_scale is not None:
            scale = self.input_scale.view(1, 1)
            assert self.input_offset is not None
            offset = None if spec.symmetric else self.input_offset.view(1, 1)
        else:
            scale, offset = range_to_scale(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), spec)
        codes = (rows / scale).round_()
        if offset is not None:
            codes += offset
        return codes.clamp_(spec.qmin, spec.qmax).to(torch.int8), scale, offset

    def extra_repr(self) -> str:
        """Shape and scheme, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.spec.scheme}"


class QuantizedExperts(QuantizedLinear):
    """The quantized form of an ``ExpertLinear``: all experts in one batch, and each as a linear of its own.

    Args:
        weight: codes int8 [experts, out, in]; scale and offset [experts, out, groups].
        spec: schemes of weight and activation.
        bias: [experts, out] of any floating dtype, or None.
        input_scale: float32 [experts, 1], for static activations.
        input_offset: int8 [experts, 1], for static activations; zero when symmetric.
    """

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.codes.shape[0]

    def linear(self, expert: int, rows: slice = slice(None)) -> QuantizedLinear:
        """The linear of one expert, or that of some of its rows; shares memory with this module."""
        offset = None if self.offset is None else self.offset[expert, rows]
        weight = QuantizedTensor(self.codes[expert, rows], self.scale[expert, rows], offset, self.spec.weight)
        bias = None if self.bias is None else self.bias[expert, rows]
        if self.input_scale is None or self.input_offset is None:
            return QuantizedLinear(weight, self.spec, bias)
        return QuantizedLinear(weight, self.spec, bias, self.input_scale[expert], self.input_offset[expert])

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """See ``ExpertLinear.forward``."""
        y = x.new_zeros((len(x), self.out_features))
        start = 0
        for expert, count in enumerate(counts):
            if count:
                y[start : start + count] = self.linear(expert)(x[start : start + count])
                start += count
        return y


def range_to_scale(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and offset that map the range [low, high] onto the codes of ``spec``.

    Symmetric: ``scale = max(|low|, |high|) / qmax``. Asymmetric: the range is widened to hold 0,
    ``scale = (high - low) / (qmax - qmin)``, ``offset = qmin - round(low / scale)``. Computed in
    float32, then rounded to ``spec.scale_dtype``, so that the codes are made for the scale that
    the engine will use. An empty range gives a scale that is tiny and positive, never 0.

    Args:
        low, high: tensors of one shape, any floating dtype, finite.
        spec: the scheme.

    Returns:
        scale float32, and offset int8 or None when symmetric; both of the shape of ``low``.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if spec.symmetric:
        return _as_held(torch.maximum(-low, high) / spec.qmax, spec), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    exact = (high - low) / (spec.qmax - spec.qmin)
    scale = _as_held(exact, spec)
    if spec.scale_dtype != "float32":
        # 255 steps of a scale that was rounded down would end short of the range: take the next number up.
        above = (scale.to(_dtype(spec)).view(torch.int16) + 1).view(_dtype(spec)).to(torch.float32)
        scale = torch.where(scale < exact, above, scale)
    offset = (spec.qmin - (low / scale).round_()).clamp_(spec.qmin, spec.qmax)
    return scale, offset.to(torch.int8)


def _as_held(scale: Tensor, spec: TensorSpec) -> Tensor:
    """The scale rounded to the type in which the engine holds it, and positive, in float32."""
    # `tiny` is the smallest normal number: engines may flush what lies below it to zero.
    return scale.to(_dtype(spec)).to(torch.float32).clamp_(min=torch.finfo(_dtype(spec)).tiny)


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.scale_dtype)
    return dtype


def integer_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [tokens, in] times weight int8 [out, in] transposed, summed exactly; float32 [tokens, out]."""
    if x.device.type == "meta" or not x.shape[0]:
        return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    if has_integer_matmul(x, weight):
        return torch._int_mm(x, weight.t()).to(torch.float32)
    # Products of int8 codes summed in double are exact; kernels without int8 have no other exact type.
    return (x.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
