# SPDX-License-Identifier: Apache-2.0
"""From the description file and stored tensors back to quantized linears."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modelslim.api import (
    FLOAT,
    ModelError,
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    SavedLinear,
    TensorSpec,
    from_e2m1_nibbles,
    from_e8m0,
    nearest,
    to_signed,
    unpack_bits,
)
from modelslim_ascendv1.caches import CACHE_TYPE, OFFSET, SCALE
from modelslim_ascendv1.int4 import unpack_rows
from modelslim_ascendv1.layout import (
    DESCRIPTION,
    FLOAT_TYPE,
    INNER,
    MULTIPLIER,
    SPARSE,
    SPARSE_FLOAT,
    TYPES,
    layout,
    type_of,
)

Shapes = Mapping[str, tuple[int, ...]]

GLOBAL_KEYS = frozenset(
    {
        "version",
        "model_quant_type",
        "group_size",
        "metadata",
        "optional",
        "kv_cache_type",
        "kv_quant_type",
        "fa_quant_type",
        "indexer_quant_type",
        "is_rot_used",
        "max_supported_tp",
    }
)
"""Keys of the description that name no tensor."""

_HINT = "the checkpoint is damaged, or another tool wrote an extension that is not known here; quantize again"


def read_layout(path: Path, shapes: Shapes, description: str = DESCRIPTION) -> dict[str, SavedLinear]:
    """The quantized linears of a checkpoint, by name.

    What only the values tell is not known yet: the specs call a weight or an activation asymmetric
    where the type allows it, and the decoded module says whether it is.

    Args:
        path: the directory.
        shapes: every tensor of the checkpoint with its shape.
        description: name of the description file.

    Raises:
        ModelError: description and tensors contradict each other; names the tensor.
    """
    types = _read_description(path / description)
    _compare(path / description, types, shapes)
    linears: dict[str, SavedLinear] = {}
    explained: set[str] = set()
    for key, type_ in types.items():
        name, _, part = key.rpartition(".")
        if type_ not in (FLOAT_TYPE, CACHE_TYPE) and part in ("weight", "weight_packed"):
            name = _outer(name, types)
            linears[name] = _saved_linear(name, type_, types, shapes)
            explained.update(linears[name].tensors)
    for key, type_ in types.items():
        if type_ == CACHE_TYPE and key.endswith((f".{SCALE}", f".{OFFSET}")):
            continue
        if (type_ != FLOAT_TYPE or key.endswith(f".{MULTIPLIER}")) and key not in explained:
            raise ModelError(
                f"{path / description}: {key} is described as {type_} and belongs to no linear of that type",
                hint=_HINT,
            )
    return linears


def _outer(name: str, names: Container[str]) -> str:
    """The linear that a quantized weight belongs to; where its input is multiplied, it lies one level deeper."""
    outer, _, last = name.rpartition(".")
    return outer if last == INNER and f"{outer}.{MULTIPLIER}" in names else name


def _read_description(file: Path) -> dict[str, str]:
    """Type by tensor name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}", hint=_HINT) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object", hint=_HINT)
    types = {key: value for key, value in content.items() if key not in GLOBAL_KEYS}
    for key, value in types.items():
        if value not in TYPES and value != CACHE_TYPE:
            raise ModelError(
                f"{file}: {key} has the type {value!r}, which is not known here", hint=nearest(str(value), TYPES)
            )
    return types


def _compare(file: Path, types: Mapping[str, str], shapes: Shapes) -> None:
    """Refuse a description that does not name exactly the tensors that are there."""
    for names, what in (
        (types.keys() - shapes.keys(), "describes {} that is in no weight file"),
        (shapes.keys() - types.keys(), "does not describe {}, which is in the weight files"),
    ):
        if names:
            first = min(names)
            others = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
            raise ModelError(
                f"{file} {what.format(first + others)}", hint="description and weights must come from the same run"
            )


def _saved_linear(name: str, type_: str, types: Mapping[str, str], shapes: Shapes) -> SavedLinear:
    has_multiplier = f"{name}.{MULTIPLIER}" in types
    inner = f"{name}.{INNER}" if has_multiplier else name

    def shape(part: str) -> tuple[int, ...]:
        full = f"{inner}.{part}"
        if full not in shapes:
            raise ModelError(f"{name} is described as {type_} and has no tensor {full}", hint=_HINT)
        if len(shapes[full]) != 2:
            raise ModelError(f"{full} has shape {shapes[full]}; {type_} stores it in two dimensions", hint=_HINT)
        return shapes[full]

    weight_rows, width = shape("weight_packed" if type_ == "W4A16" else "weight")
    rows = weight_rows * 2 if type_ == "W4A8_DYNAMIC" else weight_rows
    columns = width * (8 if type_ == "W4A16" else 2 if "MXFP" in type_ and type_.startswith("W4") else 1)
    groups = 1 if type_ in ("W8A8", *SPARSE) else shape("weight_scale")[1]
    if not groups or columns % groups:
        raise ModelError(
            f"{inner}.weight_scale has {groups} columns, which does not divide the {columns} inputs", hint=_HINT
        )
    expected = layout(
        type_,
        rows,
        columns,
        groups,
        row_parallel=type_ == "W4A8_DYNAMIC" and shape("scale_bias")[1] > 1,
        model_dtype="float32",  # shapes do not depend on it
        has_bias=f"{inner}.bias" in types,
        symmetric=f"{inner}.weight_offset" not in types,
        has_multiplier=has_multiplier,
    )
    for part, (_, size) in expected.items():
        full = f"{name}.{part}"
        if full not in shapes:
            raise ModelError(f"{name} is described as {type_} and has no tensor {full}", hint=_HINT)
        if shapes[full] != size:
            raise ModelError(
                f"{full} has shape {shapes[full]}, and a {type_} linear with {rows} outputs and {columns} inputs "
                f"has {size}",
                hint=_HINT,
            )
        if types[full] != type_of(part.removeprefix(f"{INNER}."), type_):
            raise ModelError(f"{full} is described as {types[full]}, and its linear as {type_}", hint=_HINT)
    spec = _spec(type_, columns, groups, symmetric=type_ != "W8A16" and f"{inner}.weight_offset" not in types)
    tensors = tuple(f"{name}.{part}" for part in expected)
    return SavedLinear(spec, tensors, partial(_decode, name, type_, spec))


def _spec(type_: str, columns: int, groups: int, *, symmetric: bool) -> QuantSpec:
    activation = {
        "W8A8": TensorSpec("int8", "per_tensor", symmetric=False),
        "W8A8S": TensorSpec("int8", "per_tensor", symmetric=False),
        "W8A8_MIX": TensorSpec("int8", "pd_mix", symmetric=False),
        "W8A8_DYNAMIC": TensorSpec("int8", "per_token"),
        "W4A8_DYNAMIC": TensorSpec("int8", "per_token"),
        "W4A4_DYNAMIC": TensorSpec("int4", "per_token"),
        "W8A8FP8_DYNAMIC": TensorSpec("fp8_e4m3", "per_token"),
        "W8A8_MXFP8": TensorSpec("mxfp8", "per_block", group_size=32),
        "W4A8_MXFP": TensorSpec("mxfp8", "per_block", group_size=32),
        "W4A4_MXFP4": TensorSpec("mxfp4", "per_block", group_size=32),
    }.get(type_, FLOAT)
    if type_ in SPARSE:
        codes = "float" if type_ == SPARSE_FLOAT else "int8"
        return QuantSpec(TensorSpec(codes, "per_channel", sparse=True), activation)
    if "MXFP" in type_:
        codes = "mxfp4" if type_.startswith("W4") else "mxfp8"
        return QuantSpec(TensorSpec(codes, "per_block", group_size=32), activation)
    if type_ == "W8A8FP8_DYNAMIC":
        return QuantSpec(TensorSpec("fp8_e4m3", "per_channel"), activation)
    dtype = "int4" if type_.startswith("W4") else "int8"
    symmetric = symmetric or not activation.is_float
    if groups > 1:
        weight = TensorSpec(dtype, "per_group", symmetric, columns // groups)
    else:
        weight = TensorSpec(dtype, "per_channel", symmetric)
    return QuantSpec(weight, activation)


def _decode(name: str, type_: str, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """Make the module from its tensors, by full name."""
    parts = {key.removeprefix(f"{name}.").removeprefix(f"{INNER}."): tensor for key, tensor in tensors.items()}
    input_scale = input_offset = offset = None
    if type_ == SPARSE_FLOAT:
        scale = torch.ones(len(parts["weight"]), 1)
    elif type_ in ("W8A8", "W8A8S", "W8A8_MIX"):
        input_scale = parts["input_scale"].to(torch.float32)
        input_offset = parts["input_offset"].to(torch.int8)
        scale = parts.get("weight_scale", _weight_scale(parts["deq_scale"], input_scale)).to(torch.float32)
        spec = replace(spec, activation=replace(spec.activation, symmetric=not input_offset.any()))
    else:
        stored_scale = parts["weight_scale"]
        scale = from_e8m0(stored_scale) if "MXFP" in type_ else stored_scale.to(torch.float32)
    if spec.activation.is_float and spec.weight.is_integer:
        # The engine adds the stored offset to the codes; ours is subtracted.
        stored = parts.get("weight_offset")
        offset = (0 - stored).to(torch.int8) if stored is not None and stored.any() else None
        spec = replace(spec, weight=replace(spec.weight, symmetric=offset is None))
    codes = _CODES[type_](parts) if type_ in _CODES else parts["weight"]
    weight = QuantizedTensor(codes, scale, offset, spec.weight)
    return QuantizedLinear(weight, spec, parts.get("bias"), input_scale, input_offset, parts.get(MULTIPLIER))


def _weight_scale(deq_scale: Tensor, input_scale: Tensor) -> Tensor:
    """``deq_scale / input_scale``, [out, 1]; times ``input_scale`` it gives ``deq_scale`` again, to the bit."""
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    # A row of zeros may have any deq_scale; the quotient must stay finite.
    return (deq_scale / input_scale).clamp_(max=torch.finfo(torch.float32).max).view(-1, 1)


def _unpack_words(packed: Tensor) -> Tensor:
    """int32 [out, in / 8] -> int8 [out, in]."""
    return to_signed(unpack_bits(packed, 4, packed.shape[1] * 8), 4)


_CODES: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "W4A8_DYNAMIC": lambda parts: unpack_rows(parts["weight"]),
    "W4A16": lambda parts: _unpack_words(parts["weight_packed"]),
    **dict.fromkeys(("W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"), lambda parts: _float4(parts["weight"])),
}
"""How codes are read where they are packed."""


def _float4(packed: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low bits: uint8 [out, in / 2] -> int8 [out, in]."""
    return from_e2m1_nibbles(torch.stack((packed & 15, packed >> 4), -1).flatten(-2))
