# SPDX-License-Identifier: Apache-2.0
"""The format as a table: which tensors hold a quantized linear, with dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from modelslim.api import QuantSpec

FLOAT_TYPE = "FLOAT"
SPARSE_FLOAT = "W16A16S"
SPARSE = (SPARSE_FLOAT, "W8A8S")
"""The types of weights that another tool will compress."""
DESCRIPTION = "quant_model_description.json"

TYPES = (
    FLOAT_TYPE,
    SPARSE_FLOAT,
    "W8A16",
    "W4A16",
    "W4A16_MXFP4",
    "W8A8_DYNAMIC",
    "W8A8_MIX",
    "W8A8",
    "W8A8S",
    "W8A8FP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A8_DYNAMIC",
    "W4A8_MXFP",
    "W4A4_DYNAMIC",
    "W4A4_MXFP4",
)
"""The type strings, from weak to strong: a model is called after the strongest that it holds."""

MULTIPLIER = "div.mul_scale"
"""What the input of a linear is multiplied by, behind its name; its other tensors lie under ``INNER`` then."""
INNER = "linear"

TP_SLICES = 16
"""Slices into which the inputs of a row-parallel linear are cut: the most ranks that can share it."""

ROW_PARALLEL = frozenset(
    {
        "c_proj",
        "dense",
        "dense_4h_to_h",
        "down_proj",
        "fc2",
        "linear_fc2",
        "o_proj",
        "out_proj",
        "proj",
        "w2",
        "wo",
    }
)
"""Last parts of the names of linears that the engine cuts along their inputs, one slice a rank."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a linear, by what follows the linear's name."""


def is_row_parallel(name: str) -> bool:
    """True when the engine cuts the linear along its inputs; every other one is cut along its outputs."""
    return name.rpartition(".")[2] in ROW_PARALLEL


def groups_of(spec: QuantSpec, in_features: int) -> int:
    """Number of scales in a row of the weight."""
    return in_features // spec.weight.group_size if spec.weight.group_size else 1


def deq_scale_dtype(scheme: str, model_dtype: str) -> torch.dtype:
    """How ``deq_scale`` is stored: as float32 for bfloat16 models, else as its bits, widened to int64.

    W8A8S runs on hardware without bfloat16.
    """
    return torch.float32 if model_dtype == "bfloat16" and scheme != "W8A8S" else torch.int64


def layout(
    scheme: str,
    rows: int,
    columns: int,
    groups: int,
    *,
    row_parallel: bool,
    model_dtype: str,
    has_bias: bool,
    symmetric: bool,
    has_multiplier: bool = False,
) -> Layout:
    """The tensors of one linear, by the rest of their names behind that of the linear.

    Args:
        scheme: one of ``TYPES`` without FLOAT.
        rows: outputs of the linear.
        columns: inputs of the linear.
        groups: scales in a row.
        row_parallel: True when the engine cuts it along its inputs.
        model_dtype: dtype of the model, such as ``bfloat16``; of W16A16S that of the linear.
        has_bias: True when the linear has a bias.
        symmetric: True when the weight has no offset.
        has_multiplier: True when its input is multiplied.
    """
    scales = (rows, groups)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    dtype: torch.dtype = getattr(torch, model_dtype)
    if scheme == "W4A16":
        tensors = {
            "weight_packed": (torch.int32, (rows, columns // 8)),
            "weight_scale": (dtype, scales),
            "weight_shape": (torch.int32, (2,)),
        }
        if not symmetric:
            tensors["weight_offset"] = (dtype, scales)
    elif "MXFP" in scheme:
        four = scheme.startswith("W4")
        codes = (torch.uint8, (rows, columns // 2)) if four else (torch.float8_e4m3fn, (rows, columns))
        tensors = {"weight": codes, "weight_scale": (torch.uint8, scales)}
    elif scheme == SPARSE_FLOAT:
        tensors = {"weight": (dtype, (rows, columns))}
    elif scheme in ("W8A8", "W8A8S", "W8A8_MIX"):
        tensors = {
            "weight": (torch.int8, (rows, columns)),
            "quant_bias": (torch.int32, (rows,)),
            "input_scale": (torch.float32, (1,)),
            "input_offset": (torch.float32, (1,)),
            "deq_scale": (deq_scale_dtype(scheme, model_dtype), (rows,)),
        }
        if scheme == "W8A8_MIX":
            tensors |= {"weight_scale": (torch.float32, scales), "weight_offset": (torch.float32, scales)}
    else:
        packed = scheme == "W4A8_DYNAMIC"
        tensors = {
            "weight": (_code_dtype(scheme), (rows // 2 if packed else rows, columns)),
            "weight_scale": (torch.float32, scales),
            "weight_offset": (torch.float32, scales),
        }
        if packed:
            tensors["scale_bias"] = (torch.float32, (rows, TP_SLICES if row_parallel else 1))
    if has_bias:
        tensors["bias"] = (tensors["weight"][0] if scheme == SPARSE_FLOAT else torch.float32, (rows,))
    if has_multiplier:
        inner = {f"{INNER}.{part}": tensor for part, tensor in tensors.items()}
        return {MULTIPLIER: (torch.float32, (columns,)), **inner}
    return tensors


def type_of(part: str, scheme: str) -> str:
    """The type string of a tensor of a quantized linear.

    Args:
        part: the last part of its name, or ``MULTIPLIER``.
        scheme: that of the linear.
    """
    if part == MULTIPLIER or (part == "bias" and scheme != SPARSE_FLOAT):
        return FLOAT_TYPE
    return scheme


def _code_dtype(scheme: str) -> torch.dtype:
    return torch.float8_e4m3fn if scheme == "W8A8FP8_DYNAMIC" else torch.int8


def sizes(tensors: Layout) -> dict[str, int]:
    """Bytes of each tensor."""
    return {part: prod(shape) * dtype.itemsize for part, (dtype, shape) in tensors.items()}
