# SPDX-License-Identifier: Apache-2.0
"""One linear as GPTQ stores it: codes packed along the inputs, a zero and a scale for each group of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from modelslim.api import (
    ModelError,
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    SaveError,
    pack_bits,
    to_signed,
    to_unsigned,
    unpack_bits,
)
from modelslim_gptq.schemes import refusals

WORD_BITS = 32

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a linear, by the last part of the tensor's name."""


def scale_dtype(model_dtype: str) -> str:
    """Dtype of the scales: that of the model where the readers compute in it, else float16."""
    return model_dtype if model_dtype in ("bfloat16", "float16") else "float16"


def layout(bits: int, rows: int, columns: int, groups: int, *, model_dtype: str, has_bias: bool) -> Layout:
    """The tensors of one linear.

    Args:
        bits: of a code.
        rows: outputs of the linear.
        columns: inputs of the linear.
        groups: groups of inputs.
        model_dtype: dtype of the model, such as ``bfloat16``.
        has_bias: True when the linear has a bias.
    """
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int32, (columns * bits // WORD_BITS, rows)),
        "qzeros": (torch.int32, (groups, rows * bits // WORD_BITS)),
        "scales": (getattr(torch, scale_dtype(model_dtype)), (groups, rows)),
        "g_idx": (torch.int32, (columns,)),
    }
    if has_bias:
        tensors["bias"] = (getattr(torch, model_dtype), (rows,))
    return tensors


def sizes(tensors: Layout) -> dict[str, int]:
    """Bytes of each tensor."""
    return {part: prod(shape) * dtype.itemsize for part, (dtype, shape) in tensors.items()}


def encode(name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear with their full names; see ``layout`` for dtypes and shapes.

    A symmetric weight is stored in version 1 of the format, which holds ``zero - 1``, an asymmetric one in
    version 2, which holds the zero itself: in version 1 a zero of 0 would be stored as -1.

    Raises:
        SaveError: the format cannot hold the linear.
    """
    for refusal in refusals(module.spec):
        raise SaveError(f"{name}: GPTQ has no {refusal.what}", hint=refusal.hint)
    if module.input_multiplier is not None:
        raise SaveError(f"{name}: GPTQ has no place for what its input is multiplied by", hint="smooth without it")
    bits, groups = module.spec.weight.bits, module.scale.shape[1]
    yield f"{name}.qweight", pack_bits(module.codes, bits).t().contiguous()
    yield f"{name}.qzeros", pack_bits(_zeros(module).t(), bits)
    yield f"{name}.scales", module.scale.t().contiguous().to(getattr(torch, scale_dtype(model_dtype)))
    yield f"{name}.g_idx", _group_of_input(module.in_features, groups)
    if module.bias is not None:
        yield f"{name}.bias", module.bias.to(getattr(torch, model_dtype))


def _zeros(module: QuantizedLinear) -> Tensor:
    """What is stored for the zeros, uint8 [out, groups]."""
    bits = module.spec.weight.bits
    if module.offset is not None:
        return to_unsigned(module.offset, bits)
    return torch.full(module.scale.shape, symmetric_zero(bits) - 1, dtype=torch.uint8)


def symmetric_zero(bits: int) -> int:
    """The code, counted from 0, that stands for 0 in a symmetric weight."""
    return 1 << (bits - 1)


def _group_of_input(columns: int, groups: int) -> Tensor:
    """int32 [in]."""
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def decode(name: str, spec: QuantSpec, version: int, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """Make the module from its tensors.

    Args:
        name: the linear's stored name.
        spec: its scheme.
        version: of the format: 1 or 2.
        tensors: by full name.

    Raises:
        ModelError: the values contradict the scheme.
    """
    bits = spec.weight.bits
    columns = tensors[f"{name}.g_idx"].shape[0]
    groups, rows = tensors[f"{name}.scales"].shape
    if not torch.equal(tensors[f"{name}.g_idx"].to(torch.int32), _group_of_input(columns, groups)):
        raise ModelError(
            f"{name}.g_idx does not give neighbouring inputs to one group",
            hint="it was quantized with desc_act, which is not read here; quantize with desc_act: false",
        )
    zeros = unpack_bits(tensors[f"{name}.qzeros"], bits, rows).t().contiguous()
    if version == 1:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    if spec.weight.symmetric and (zeros != symmetric_zero(bits)).any():
        raise ModelError(
            f"{name}.qzeros is not {symmetric_zero(bits)} everywhere, and config.json says that sym is true",
            hint="readers that believe config.json compute nonsense from it; quantize again",
        )
    codes = to_signed(unpack_bits(tensors[f"{name}.qweight"].t(), bits, columns), bits)
    offset = None if spec.weight.symmetric else to_signed(zeros, bits)
    scale = tensors[f"{name}.scales"].t().contiguous().to(torch.float32)
    return QuantizedLinear(QuantizedTensor(codes, scale, offset, spec.weight), spec, tensors.get(f"{name}.bias"))
