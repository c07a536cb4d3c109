# SPDX-License-Identifier: Apache-2.0
"""One linear as AWQ stores it for GEMM kernels: eight outputs in a word, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from modelslim.api import (
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    SaveError,
    pack_bits,
    to_signed,
    to_unsigned,
    unpack_bits,
)
from modelslim_awq.schemes import refusals

BITS, PER_WORD = 4, 8
SYMMETRIC_ZERO = 8
"""The code, counted from 0, that stands for 0 in a symmetric weight."""

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies at each place of a word, the lowest place first."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a linear, by the last part of the tensor's name."""


def scale_dtype(model_dtype: str) -> str:
    """Dtype of the scales: that of the model where the readers compute in it, else float16."""
    return model_dtype if model_dtype in ("bfloat16", "float16") else "float16"


def layout(rows: int, columns: int, groups: int, *, model_dtype: str, has_bias: bool) -> Layout:
    """The tensors of one linear.

    Args:
        rows: outputs of the linear.
        columns: inputs of the linear.
        groups: groups of inputs.
        model_dtype: dtype of the model, such as ``bfloat16``.
        has_bias: True when the linear has a bias.
    """
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int32, (columns, rows // PER_WORD)),
        "qzeros": (torch.int32, (groups, rows // PER_WORD)),
        "scales": (getattr(torch, scale_dtype(model_dtype)), (groups, rows)),
    }
    if has_bias:
        tensors["bias"] = (getattr(torch, model_dtype), (rows,))
    return tensors


def sizes(tensors: Layout) -> dict[str, int]:
    """Bytes of each tensor."""
    return {part: prod(shape) * dtype.itemsize for part, (dtype, shape) in tensors.items()}


def encode(name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear with their full names; see ``layout`` for dtypes and shapes.

    Raises:
        SaveError: the format cannot hold the linear.
    """
    for refusal in refusals(module.spec):
        raise SaveError(f"{name}: AWQ has no {refusal.what}", hint=refusal.hint)
    if module.input_multiplier is not None:
        raise SaveError(f"{name}: AWQ has no place for what its input is multiplied by", hint="smooth without it")
    yield f"{name}.qweight", _pack(to_unsigned(module.codes, BITS))
    yield f"{name}.qzeros", _pack(_zeros(module))
    yield f"{name}.scales", module.scale.t().contiguous().to(getattr(torch, scale_dtype(model_dtype)))
    if module.bias is not None:
        yield f"{name}.bias", module.bias.to(getattr(torch, model_dtype))


def _zeros(module: QuantizedLinear) -> Tensor:
    """uint8 [out, groups]."""
    if module.offset is not None:
        return to_unsigned(module.offset, BITS)
    return torch.full(module.scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [out, any] -> int32 [any, out / 8]."""
    # Rows are put in order and packed before what is left of them is turned.
    eights = codes.reshape(-1, PER_WORD, codes.shape[1])[:, list(ORDER)]
    return pack_bits(eights.transpose(1, 2), BITS).squeeze(-1).t().contiguous()


def _unpack(packed: Tensor) -> Tensor:
    """The inverse of ``_pack``."""
    eights = unpack_bits(packed.t().unsqueeze(-1), BITS, PER_WORD).transpose(1, 2)
    places = [ORDER.index(output) for output in range(PER_WORD)]
    return eights[:, places].flatten(0, 1)


def decode(name: str, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """Make the module from its tensors.

    Args:
        name: the linear's stored name.
        spec: its scheme; the weight becomes symmetric when its zeros say so.
        tensors: by full name.
    """
    codes = to_signed(_unpack(tensors[f"{name}.qweight"]), BITS)
    zeros = _unpack(tensors[f"{name}.qzeros"])
    symmetric = bool((zeros == SYMMETRIC_ZERO).all())
    weight = replace(spec.weight, symmetric=symmetric)
    offset = None if symmetric else to_signed(zeros, BITS)
    scale = tensors[f"{name}.scales"].t().contiguous().to(torch.float32)
    bias = tensors.get(f"{name}.bias")
    return QuantizedLinear(QuantizedTensor(codes, scale, offset, weight), replace(spec, weight=weight), bias)
