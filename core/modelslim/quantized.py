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
from modelslim.scales import at_run_time, from_codes, range_to_scale, rounded_inputs, spread, to_codes
from modelslim.types import QuantSpec, TensorSpec


@dataclass
class QuantizedTensor:
    """A weight as codes and scales.

    Attributes:
        codes: [out, in]. int8 for integers, a code of fewer bits in a byte of its own, such as -8..7; int8 for
            float4, its values doubled, such as -12..12; float8_e4m3fn for float8. Of a sparse weight that stays
            float the values themselves, in its own dtype.
        scale: float32 [out, groups]; groups is 1 for ``per_channel``. In blocks of several rows
            [ceil(out / group_rows), ceil(in / group_size)]. Ones where the codes are the values.
        offset: int8 [out, groups], or None when symmetric.
        spec: how it was quantized.
        whole_scale: float32 [1], by which every scale can be divided to become a float8 number; nvfp4 only.

    Weights of fused experts have one more dimension in front: [experts, out, in] and so on.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    spec: TensorSpec
    whole_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """``(codes - offset) * scale`` in float32, of the shape of the codes."""
        values = from_codes(self.codes, self.spec)
        if self.spec.group_rows > 1:
            return values.mul_(spread(self.scale, tuple(self.codes.shape), self.spec))
        groups = values.view(*self.scale.shape, -1)
        if self.offset is not None:
            groups -= self.offset.unsqueeze(-1)
        return groups.mul_(self.scale.unsqueeze(-1)).view(self.codes.shape)


class QuantizedLinear(nn.Module):
    """A linear whose weight is quantized, and whose input is quantized as its spec says.

    Args:
        weight: the weight.
        spec: schemes of weight and activation.
        bias: [out] of any floating dtype, or None.
        input_scale: float32 [1], for static activations; of nvfp4 the scale of the whole tensor.
        input_offset: int8 [1], for static activations; zero when symmetric.
        input_multiplier: float32 [in], by which the input is multiplied before all else; None for most linears.
            The weight is that of the multiplied input.
        notes: what the algorithm says in the report about how it was made: short sentences about what is not as the
            protocol has it.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    whole_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_offset: Tensor | None
    input_multiplier: Tensor | None

    def __init__(
        self,
        weight: QuantizedTensor,
        spec: QuantSpec,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_offset: Tensor | None = None,
        input_multiplier: Tensor | None = None,
        *,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if spec.is_static != (input_scale is not None and input_offset is not None):
            raise ValueError("static activations, and only they, come with input_scale and input_offset")
        self.spec = spec
        self.notes = tuple(notes)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("whole_scale", weight.whole_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_offset", input_offset)
        self.register_buffer("input_multiplier", input_multiplier)

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
        """The weight as codes and scales."""
        return QuantizedTensor(self.codes, self.scale, self.offset, self.spec.weight, self.whole_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any floating dtype -> [..., out] of the same dtype."""
        if self.spec.activation.is_float:
            if self.input_multiplier is not None:
                x = (x.to(torch.float32) * self.input_multiplier).to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.dequantize().to(x.dtype), bias)
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if self.input_multiplier is not None:
            rows = rows * self.input_multiplier
        if self._multiplies_integers:
            codes, scale, offset = self._quantize_input(rows)
            if offset is None:
                y = integer_matmul(codes, self.codes)
            else:
                # A row of ones gives the sums of the weight's rows in the same product.
                y = integer_matmul(torch.cat([codes, codes.new_ones(1, codes.shape[1])]), self.codes)
                y = y[:-1] - offset.to(torch.float32) * y[-1]
            y = y * (scale * self.scale.view(1, -1))
        else:
            values = rounded_inputs(rows, self.spec.activation, self.input_scale, self.input_offset)
            y = values @ self.weight.dequantize().t()
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows float32 [tokens, in] -> codes int8, scale [tokens or 1, 1], offset or None."""
        spec = at_run_time(self.spec.activation, len(rows))
        offset: Tensor | None
        if spec.scope == "per_tensor":
            assert self.input_scale is not None and self.input_offset is not None
            scale = self.input_scale.view(1, 1)
            offset = None if spec.symmetric else self.input_offset.view(1, 1)
        else:
            scale, offset = range_to_scale(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), spec)
        steps = (rows / scale).round_()
        return to_codes(steps if offset is None else steps.add_(offset), spec), scale, offset

    @property
    def _multiplies_integers(self) -> bool:
        """True when the engine multiplies codes and scales the sums, which takes one scale for each row."""
        weight, activation = self.spec.weight, self.spec.activation
        return weight.is_integer and activation.is_integer and self.scale.shape[-1] == 1 and self.offset is None

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
        input_multiplier: float32 [experts, in], or None.
        notes: see there, about all experts together.
    """

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.codes.shape[0]

    def linear(self, expert: int, rows: slice = slice(None)) -> QuantizedLinear:
        """The linear of one expert, or that of some of its rows (of whole blocks); shares memory with this module."""
        offset = None if self.offset is None else self.offset[expert, rows]
        whole = None if self.whole_scale is None else self.whole_scale[expert]
        scale = self.scale[expert, self._scale_rows(rows)]
        weight = QuantizedTensor(self.codes[expert, rows], scale, offset, self.spec.weight, whole)
        bias = None if self.bias is None else self.bias[expert, rows]
        inputs = (self.input_scale, self.input_offset, self.input_multiplier)
        return QuantizedLinear(weight, self.spec, bias, *(None if one is None else one[expert] for one in inputs))

    def _scale_rows(self, rows: slice) -> slice:
        """Where the scales of some rows are."""
        size = self.spec.weight.group_rows
        start, stop, step = rows.indices(self.out_features)
        if size == 1:
            return rows
        if step != 1 or start % size or (stop % size and stop != self.out_features):
            raise ValueError(f"rows {start} to {stop} are not whole blocks of {size}")
        return slice(start // size, -(-stop // size))

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """See ``ExpertLinear.forward``."""
        y = x.new_zeros((len(x), self.out_features))
        start = 0
        for expert, count in enumerate(counts):
            if count:
                y[start : start + count] = self.linear(expert)(x[start : start + count])
                start += count
        return y


def integer_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [tokens, in] times weight int8 [out, in] transposed, summed exactly; float32 [tokens, out]."""
    if x.device.type == "meta" or not x.shape[0]:
        return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    if has_integer_matmul(x, weight):
        return torch._int_mm(x, weight.t()).to(torch.float32)
    # Products of int8 codes summed in double are exact; kernels without int8 have no other exact type.
    return (x.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
