# SPDX-License-Identifier: Apache-2.0
"""From a quantized linear to the tensors that store it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from modelslim.api import QuantizedLinear, SaveError, e2m1_nibbles, pack_bits, to_e8m0
from modelslim_ascendv1.int4 import pack_rows
from modelslim_ascendv1.layout import INNER, MULTIPLIER, SPARSE_FLOAT, TP_SLICES, deq_scale_dtype, is_row_parallel
from modelslim_ascendv1.schemes import refusals

Tensors = Iterator[tuple[str, Tensor]]

_INT32_MAX = 2**31 - 1


def encode(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """The tensors of a linear with their full names; see ``layout`` for dtypes and shapes.

    Raises:
        SaveError: the format has no type for the linear's scheme, or ``quant_bias`` does not fit.
    """
    for refusal in refusals(module.spec):
        raise SaveError(f"{name}: ascendv1 has no type for {refusal.what}", hint=refusal.hint)
    inner = name
    if module.input_multiplier is not None:
        inner = f"{name}.{INNER}"
        yield f"{name}.{MULTIPLIER}", module.input_multiplier
    for part, tensor in _WRITERS[module.spec.scheme](name, module, model_dtype):
        yield f"{inner}.{part}", tensor
    if module.bias is not None:
        own = module.spec.scheme == SPARSE_FLOAT
        yield f"{inner}.bias", module.bias if own else module.bias.to(torch.float32)


def _static(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """Y = deq_scale * (x_q @ W_q + quant_bias), where x_q = clamp(round(x / input_scale + input_offset))."""
    assert module.input_scale is not None and module.input_offset is not None
    deq_scale = module.input_scale * module.scale.view(-1)
    if module.bias is not None:
        # A row of zeros has no scale of its own: with this one its quant_bias is 1 or -1 and exact.
        zeros = (module.codes.amax(1) == 0) & (module.codes.amin(1) == 0) & (module.bias != 0)
        deq_scale = torch.where(zeros, module.bias.to(torch.float32).abs(), deq_scale)
    yield "weight", module.codes
    yield "quant_bias", _quant_bias(name, module, deq_scale)
    yield "input_scale", module.input_scale
    yield "input_offset", module.input_offset.to(torch.float32)
    if deq_scale_dtype(module.spec.scheme, model_dtype) is torch.int64:
        # Scales are positive: widening keeps the upper half zero.
        deq_scale = deq_scale.view(torch.int32).to(torch.int64)
    yield "deq_scale", deq_scale


def _quant_bias(name: str, module: QuantizedLinear, deq_scale: Tensor) -> Tensor:
    """``round(bias / deq_scale - input_offset * sum_k W_q)`` in int32 [out]."""
    assert module.input_offset is not None
    value = -module.input_offset.to(torch.float64) * _row_sums(module.codes).view(-1).to(torch.float64)
    if module.bias is not None:
        quotient = module.bias.to(torch.float64) / deq_scale.to(torch.float64)
        value += torch.where(module.bias == 0, 0.0, quotient)
    value.round_()
    # The engine adds it to the integer product, which may reach 128 * 128 * in_features, in 32 bits.
    limit = _INT32_MAX - 128 * 128 * module.in_features
    lost = torch.nonzero(~(value.abs() <= limit)).view(-1)
    if len(lost):
        raise SaveError(
            f"{name}: the bias of {len(lost)} of {module.out_features} rows (first row {int(lost[0])}) is too large "
            f"for W8A8: the format stores bias / deq_scale as a 32-bit integer, and the weights of these rows are "
            f"so small that it would be {float(value[lost[0]]):.3g}",
            hint="leave this linear, and those fused with it, in float, or use W8A8_DYNAMIC for them, "
            "which adds the bias as it is",
        )
    return value.to(torch.int32)


def _plain(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """W16A16S: a weight that is float and sparse."""
    yield "weight", module.codes


def _mixed(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """W8A8_MIX: W8A8 for tokens that are generated, and the scales of W8A8_DYNAMIC for prompts."""
    yield from _static(name, module, model_dtype)
    yield "weight_scale", module.scale
    yield "weight_offset", torch.zeros_like(module.scale)


def _microscaling(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """The MXFP types: float8 codes, or two float4 codes a byte, and the exponents of the blocks' scales."""
    if module.spec.weight.element == "e4m3":
        yield "weight", module.codes
    else:
        nibbles = e2m1_nibbles(module.codes)
        yield "weight", nibbles[:, ::2] | nibbles[:, 1::2] << 4
    yield "weight_scale", to_e8m0(module.scale)


def _scaled(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """Codes with a scale and an offset for each row or group."""
    yield "weight", module.codes
    yield "weight_scale", module.scale
    yield "weight_offset", _added_offset(module)


def _packed_rows(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """W4A8_DYNAMIC: two rows a byte, and the sums that the kernel needs to correct a shift by 8, ``scale_bias``."""
    yield "weight", pack_rows(module.codes)
    yield "weight_scale", module.scale
    yield "weight_offset", torch.zeros_like(module.scale)
    sums = _row_sums(module.codes, TP_SLICES if is_row_parallel(name) else 1)
    yield "scale_bias", (8.0 * sums.to(torch.float64) * module.scale.to(torch.float64)).to(torch.float32)


def _packed_words(name: str, module: QuantizedLinear, model_dtype: str) -> Tensors:
    """W4A16, under the names of compressed-tensors: eight inputs in one int32."""
    dtype: torch.dtype = getattr(torch, model_dtype)
    yield "weight_packed", pack_bits(module.codes, 4)
    yield "weight_scale", module.scale.to(dtype)
    yield "weight_shape", torch.tensor(module.codes.shape, dtype=torch.int32)
    if module.offset is not None:
        yield "weight_offset", _added_offset(module).to(dtype)


def _added_offset(module: QuantizedLinear) -> Tensor:
    """The offset as the engine wants it, float32 [out, groups].

    The operators npu_weight_quant_batchmatmul and npu_grouped_matmul compute
    ``(codes + antiquant_offset) * antiquant_scale``, while ours are ``(codes - offset) * scale``.
    """
    if module.offset is None:
        return torch.zeros_like(module.scale)
    return 0 - module.offset.to(torch.float32)  # not a unary minus, which would store -0.0


def _row_sums(codes: Tensor, slices: int = 1) -> Tensor:
    """Sums of int8 [out, in] over each of ``slices`` equal parts of a row, int32 [out, slices]."""
    columns = codes.shape[1] // slices
    # Products with ones: unlike a sum they convert nothing, and take a fifth of the time, in slices a twentieth.
    # In blocks, since the kernel may copy what it is given.
    ones = torch.ones(columns, 1, dtype=torch.int8)
    blocks = (block.reshape(-1, columns) for block in torch.split(codes, 256))
    return torch.cat([torch._int_mm(block, ones).view(-1, slices) for block in blocks])


_WRITERS: Mapping[str, Callable[[str, QuantizedLinear, str], Tensors]] = {
    "W8A8": _static,
    "W8A8S": _static,
    SPARSE_FLOAT: _plain,
    "W8A8_MIX": _mixed,
    "W8A8_DYNAMIC": _scaled,
    "W8A16": _scaled,
    "W8A8FP8_DYNAMIC": _scaled,
    "W4A4_DYNAMIC": _scaled,
    "W8A8_MXFP8": _microscaling,
    "W4A8_MXFP": _microscaling,
    "W4A4_MXFP4": _microscaling,
    "W4A16_MXFP4": _microscaling,
    "W4A8_DYNAMIC": _packed_rows,
    "W4A16": _packed_words,
}
