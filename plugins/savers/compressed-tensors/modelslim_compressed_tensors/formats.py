# SPDX-License-Identifier: Apache-2.0
"""The formats as a table: which schemes each takes, and how it stores codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from modelslim.api import QuantizedLinear, QuantSpec
from modelslim_compressed_tensors.codes import NIBBLES, PLAIN, WORDS, Codes, Layout
from modelslim_compressed_tensors.scales import EXPONENTS, HELD, SHARES, Scales

VERSION = "0.20.0"
"""Release of the compressed-tensors package whose layout this is."""

MIXED = "mixed-precision"
"""Format of a model whose linears have several."""


@dataclass(frozen=True)
class Format:
    """One way of storing linears.

    Attributes:
        name: the word for it in config.json.
        takes: whether a scheme is stored so.
        codes: how the codes are stored.
        scales: how the scales are stored.
    """

    name: str
    takes: Callable[[QuantSpec], bool]
    codes: Codes
    scales: Scales


def _takes(weights: tuple[str, ...], *inputs: str) -> Callable[[QuantSpec], bool]:
    """Schemes with one of these dtypes of the weight, and one of those of the inputs, or any where none is given."""
    return lambda spec: spec.weight.dtype in weights and (not inputs or spec.activation.dtype in inputs)


INTEGERS = ("int8", "int4", "int3", "int2")

FORMATS = (
    Format("int-quantized", _takes(INTEGERS, "int8"), PLAIN, HELD),
    # The package would store inputs of float8 beside codes that are not packed, and vLLM reads packed ones.
    Format("pack-quantized", _takes(INTEGERS, "float", "fp8_e4m3"), WORDS, HELD),
    Format("float-quantized", _takes(("fp8_e4m3",), "fp8_e4m3"), PLAIN, HELD),
    Format("naive-quantized", _takes(("fp8_e4m3",), "float"), PLAIN, HELD),
    Format("mxfp8-quantized", _takes(("mxfp8",)), PLAIN, EXPONENTS),
    Format("mxfp4-pack-quantized", _takes(("mxfp4",)), NIBBLES, EXPONENTS),
    Format("nvfp4-pack-quantized", _takes(("nvfp4",)), NIBBLES, SHARES),
)


def format_of(spec: QuantSpec) -> Format:
    """How a scheme is stored, which ``refusals`` has nothing against."""
    return next(one for one in FORMATS if one.takes(spec))


def layout(spec: QuantSpec, rows: int, columns: int, model_dtype: str, *, has_bias: bool) -> Layout:
    """The tensors of one linear.

    Args:
        spec: its scheme.
        rows: its outputs.
        columns: its inputs.
        model_dtype: dtype of the model, such as ``bfloat16``, in which bias and most scales are stored.
        has_bias: True when it has a bias.
    """
    dtype: torch.dtype = getattr(torch, model_dtype)
    form = format_of(spec)
    tensors = {**form.codes.layout(spec, rows, columns), **form.scales.layout(spec, rows, columns, dtype)}
    if spec.activation.dtype == "nvfp4":
        tensors["input_global_scale"] = (torch.float32, (1,))
    elif spec.is_static:
        tensors["input_scale"] = (dtype, (1,))
        if not spec.activation.symmetric:
            tensors["input_zero_point"] = (torch.int8, (1,))
    if has_bias:
        tensors["bias"] = (dtype, (rows,))
    return tensors


def sizes(tensors: Layout) -> dict[str, int]:
    """Bytes of each tensor."""
    return {part: prod(shape) * dtype.itemsize for part, (dtype, shape) in tensors.items()}


def tensors_of(module: QuantizedLinear, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear, as ``layout`` says."""
    form = format_of(module.spec)
    yield from form.codes.encode(module)
    yield from form.scales.encode(module, dtype)
    if module.input_scale is not None and module.input_offset is not None:
        if module.spec.activation.dtype == "nvfp4":
            yield "input_global_scale", 1 / module.input_scale  # readers divide by it
        else:
            yield "input_scale", module.input_scale.to(dtype)
            # Readers of a symmetric scheme have no room for a zero point.
            if not module.spec.activation.symmetric:
                yield "input_zero_point", module.input_offset
    if module.bias is not None:
        yield "bias", module.bias.to(dtype)
