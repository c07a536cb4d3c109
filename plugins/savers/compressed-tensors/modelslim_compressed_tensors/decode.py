# SPDX-License-Identifier: Apache-2.0
"""From config.json and stored tensors back to quantized linears."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelslim.api import ModelError, QuantizedLinear, QuantizedTensor, SavedLinear
from modelslim_compressed_tensors.codes import WORDS, words
from modelslim_compressed_tensors.config import METHOD, Group, Groups, read_groups
from modelslim_compressed_tensors.formats import layout

Shapes = Mapping[str, tuple[int, ...]]

CONFIG = "config.json"
KEY = "quantization_config"

_QUANTIZED = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
        *("input_scale", "input_zero_point", "input_global_scale"),
    }
)
"""Last parts of the names of tensors that only a quantized linear has."""

_HINT = "the checkpoint is damaged, or its config.json belongs to another one; quantize again"


def recognizes(path: Path) -> bool:
    """True when config.json says that the checkpoint is of this format."""
    return read_config(path).get("quant_method") == METHOD


def read_layout(path: Path, shapes: Shapes) -> dict[str, SavedLinear]:
    """The quantized linears of a checkpoint, by name.

    Args:
        path: the directory.
        shapes: every tensor of the checkpoint with its shape.

    Raises:
        ModelError: config.json and tensors contradict each other; names the tensor.
    """
    place = f"{path / CONFIG}: {KEY}"
    groups = read_groups(read_config(path), place)
    parts: dict[str, set[str]] = {}
    for key in shapes:
        name, _, part = key.rpartition(".")
        parts.setdefault(name, set()).add(part)
    quantized = {name for name, found in parts.items() if found & _QUANTIZED}
    kinds = {name.rpartition(".")[2] for name in quantized}
    linears: dict[str, SavedLinear] = {}
    for name, found in parts.items():
        group = groups.of(name)
        if name in quantized:
            if group is None:
                extra = min(found & _QUANTIZED)
                raise ModelError(f"{name}.{extra} is stored, and {place} has no group for {name}", hint=_HINT)
            linears[name] = _saved_linear(name, group, found, shapes)
        elif group is not None and "weight" in found and _must_be_quantized(name, groups, kinds):
            raise ModelError(f"{place} says that {name} is quantized, and there is no {name}.weight_scale", hint=_HINT)
    return linears


def _must_be_quantized(name: str, groups: Groups, kinds: set[str]) -> bool:
    """True for a linear with a float weight that is named, or whose like elsewhere are quantized."""
    # A group for every linear leaves open whether the owner of a weight is one.
    return groups.names(name) or name.rpartition(".")[2] in kinds


def read_config(path: Path) -> Mapping[str, Any]:
    """``quantization_config``; empty when there is none."""
    file = path / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}", hint=_HINT) from error
    found = content.get(KEY) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _saved_linear(name: str, group: Group, found: set[str], shapes: Shapes) -> SavedLinear:
    form, spec = group.format, group.spec
    for part in (form.codes.part, "weight_scale"):
        if part not in found:
            raise ModelError(f"{name} is {form.name}, and there is no {name}.{part}", hint=_HINT)
        if len(shapes[f"{name}.{part}"]) != 2:
            shape = shapes[f"{name}.{part}"]
            raise ModelError(f"{name}.{part} has the shape {shape}; it is stored in two dimensions", hint=_HINT)
    rows, width = shapes[f"{name}.{form.codes.part}"]
    columns = form.codes.columns(spec, width)
    if form.codes is WORDS and spec.weight.group_size:
        # The last word of a row may hold fewer codes than it could; without groups the stored shape says how many.
        columns = shapes[f"{name}.weight_scale"][1] * spec.weight.group_size
    expected = layout(spec, rows, columns, "float32", has_bias="bias" in found)  # shapes do not depend on the dtype
    for part in sorted(found - expected.keys()):
        raise ModelError(f"{name}.{part} is stored, and {form.name} {spec.scheme} linears have none", hint=_HINT)
    for part, (_, shape) in expected.items():
        full = f"{name}.{part}"
        if part not in found:
            raise ModelError(f"{name} is {form.name} {spec.scheme}, and there is no {full}", hint=_HINT)
        if shapes[full] != shape:
            raise ModelError(
                f"{full} has the shape {shapes[full]}, and the other tensors of {name} ask for {shape}", hint=_HINT
            )
    return SavedLinear(spec, tuple(f"{name}.{part}" for part in expected), partial(_decode, name, group))


def _decode(name: str, group: Group, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """Make the module from its tensors, by full name."""
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
    spec = group.spec
    if "weight_shape" in parts:
        _check_shape(name, group, parts)
    codes, offset = group.format.codes.decode(spec, parts)
    scale, whole = group.format.scales.decode(parts)
    weight = QuantizedTensor(codes, scale, offset, spec.weight, whole)
    if not spec.is_static:
        return QuantizedLinear(weight, spec, parts.get("bias"))
    if "input_global_scale" in parts:
        input_scale = 1 / parts["input_global_scale"]
    else:
        input_scale = parts["input_scale"].to(torch.float32)
    input_offset = parts.get("input_zero_point", torch.zeros(1, dtype=torch.int8))
    return QuantizedLinear(weight, spec, parts.get("bias"), input_scale, input_offset)


def _check_shape(name: str, group: Group, parts: Mapping[str, Tensor]) -> None:
    stated = tuple(parts["weight_shape"].tolist())
    rows, width = parts["weight_packed"].shape
    size, groups = group.spec.weight.group_size, parts["weight_scale"].shape[1]
    columns = stated[-1] if size is None else size * groups
    if stated != (rows, columns) or words(columns, group.spec) != width:
        raise ModelError(
            f"{name}.weight_shape says {list(stated)}, which the other tensors of {name} contradict", hint=_HINT
        )
