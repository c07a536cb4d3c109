# SPDX-License-Identifier: Apache-2.0
"""The rules of an ascendv1 checkpoint as vLLM-Ascend reads it, checked with numpy alone.

Written from the engine's side and independent of the saver: nothing of the project is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np
from ascend_output import Linear, Output, Stored, decode, parts_of, type_of

GLOBAL_KEYS = {"version", "model_quant_type", "group_size", "metadata", "optional"}
DENSE_TYPES = {"FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16"}
EXPERT_TYPES = {"FLOAT", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16"}
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
ROW_PARALLEL = {
    "down_proj",
    "o_proj",
    "w2",
    "out_proj",
    "dense",
    "dense_4h_to_h",
    "proj",
    "c_proj",
    "fc2",
    "linear_fc2",
}
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")


def find_problems(output: Output, linears: Mapping[str, Linear]) -> Iterator[str]:
    """Everything that the engine would refuse, or read wrongly.

    Args:
        output: the checkpoint.
        linears: every linear of the source, experts one by one, by the name that it must have.
    """
    yield from _files(output)
    yield from _description(output)
    yield from _finite(output)
    for name, linear in linears.items():
        type_ = type_of(output, name)
        if type_ not in DENSE_TYPES | EXPERT_TYPES:
            yield f"{name}: the type {type_!r}"
        elif type_ != "FLOAT":
            yield from _linear(output, name, type_, linear)
    yield from _float_by_name(output, linears)
    yield from _fused(output, linears)
    yield from _experts(output, linears)


def find_unsupported(output: Output, linears: Mapping[str, Linear]) -> Iterator[str]:
    """Linears whose type is registered, and not for linears of their kind."""
    for name in linears:
        if type_of(output, name) not in (EXPERT_TYPES if EXPERT.fullmatch(name) else DENSE_TYPES):
            yield name


def _files(output: Output) -> Iterator[str]:
    if "model.safetensors.index.json" in output.files:
        yield "model.safetensors.index.json is there, which names the float model's shards"
    if any(name.startswith("model") and name.endswith(".safetensors") for name in output.files):
        yield "float weights were copied"
    configs = [output.config, *(part for part in output.config.values() if isinstance(part, dict))]
    if any("quantization_config" in config for config in configs):
        yield "config.json holds a quantization_config, for which the description is not opened"
    weight_map = output.index.get("weight_map", {})
    if weight_map.keys() != output.tensors.keys():
        yield f"the index names {len(weight_map)} tensors of {len(output.tensors)}"
    if missing := set(weight_map.values()) - output.files:
        yield f"the index names files that are not there: {missing}"
    total = sum(tensor.data.nbytes // (2 if tensor.dtype == "BF16" else 1) for tensor in output.tensors.values())
    if output.index.get("metadata", {}).get("total_size") != total:
        yield f"the index gives another size than {total} bytes"


def _description(output: Output) -> Iterator[str]:
    named = output.description.keys() - GLOBAL_KEYS
    for name in sorted(named ^ output.tensors.keys()):
        yield f"{name}: {'described and not stored' if name in named else 'stored and not described'}"
    types = {output.description[name] for name in named}
    group_size = output.description.get("group_size")
    if group_size != (32 if "W4A16" in types else 0):
        yield f"group_size is {group_size}"
    if output.description.get("version") != "1.0.0":
        yield "the version is not 1.0.0, which packed int4 needs"
    for name in sorted(named):
        if "embed_tokens" in name and output.description[name] != "FLOAT":
            yield f"{name}: the engine cannot quantize the embedding"
        if name.endswith("kv_b_proj.weight") and output.description[name] != "FLOAT":
            yield f"{name}: multi-head latent attention needs it in float"


def _finite(output: Output) -> Iterator[str]:
    for name, tensor in output.tensors.items():
        if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
            yield f"{name}: not finite"


def _linear(output: Output, name: str, type_: str, linear: Linear) -> Iterator[str]:
    rows, columns = linear.weight.shape
    parts = parts_of(output, name)
    expected = _layout(name, type_, rows, columns, output.description["group_size"])
    if linear.bias is not None:
        expected["bias"] = ("F32", (rows,))
    found = {part: (tensor.dtype, tensor.data.shape) for part, tensor in parts.items()}
    if found != expected:
        yield f"{name}: {found} where {type_} has {expected}"
        return
    for part in parts:
        wanted = "FLOAT" if part == "bias" else type_
        if output.description.get(f"{name}.{part}") != wanted:
            yield f"{name}.{part}: described as {output.description.get(f'{name}.{part}')}, not as {wanted}"
    if linear.bias is not None and not np.array_equal(parts["bias"].data, linear.bias):
        yield f"{name}: another bias than the source's"
    if type_ == "W8A8":
        yield from _static(name, parts)
    if type_ in ("W8A8_DYNAMIC", "W8A16", "W4A8_DYNAMIC") and parts["weight_offset"].data.any():
        yield f"{name}: an offset in a symmetric weight"
    if type_ == "W4A8_DYNAMIC":
        sums = parts["scale_bias"].data
        slices = decode(output, name).reshape(rows, sums.shape[1], -1).sum(2, dtype="f8") * 8
        if not np.allclose(sums, slices, rtol=1e-5, atol=1e-5):
            yield f"{name}: scale_bias is not 8 times the sums of the weight"
    if type_ == "W4A16" and parts["weight_shape"].data.tolist() != [rows, columns]:
        yield f"{name}: weight_shape is {parts['weight_shape'].data}"
    step = _step(parts, columns)
    error = np.abs(decode(output, name) - linear.weight)
    # A scale that was rounded to bfloat16 may leave the largest value of a row a little out of reach.
    limit = 0.5 * step + 2**-8 * np.abs(linear.weight) + 1e-6
    if (error > limit).any():
        yield f"{name}: {(error > limit).sum()} weights are further from the source than half a step"


def _layout(name: str, type_: str, rows: int, columns: int, group_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    if type_ == "W8A8":
        return {
            "weight": ("I8", (rows, columns)),
            "input_scale": ("F32", (1,)),
            "input_offset": ("F32", (1,)),
            "deq_scale": ("F32", (rows,)),
            "quant_bias": ("I32", (rows,)),
        }
    if type_ == "W4A16":
        return {
            "weight_packed": ("I32", (rows, columns // 8)),
            "weight_scale": ("BF16", (rows, columns // (group_size or columns))),
            "weight_shape": ("I32", (2,)),
        }
    scales: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_scale": ("F32", (rows, 1)),
        "weight_offset": ("F32", (rows, 1)),
    }
    if type_ == "W4A8_DYNAMIC":
        slices = 16 if name.rpartition(".")[2] in ROW_PARALLEL else 1
        return {"weight": ("I8", (rows // 2, columns)), **scales, "scale_bias": ("F32", (rows, slices))}
    return {"weight": ("I8", (rows, columns)), **scales}


def _static(name: str, parts: Mapping[str, Stored]) -> Iterator[str]:
    scale, offset = float(parts["input_scale"].data[0]), float(parts["input_offset"].data[0])
    if scale <= 0 or np.float32(scale).view("<u4") & 0xFFFF:
        yield f"{name}: input_scale {scale} is not positive, or loses digits in bfloat16"
    if offset != round(offset) or not -128 <= offset <= 127:
        yield f"{name}: input_offset {offset} is no int8"
    deq_scale = parts["deq_scale"].data.astype("f8")
    bias = parts["bias"].data.astype("f8") if "bias" in parts else 0.0
    wanted = np.round(bias / deq_scale - offset * parts["weight"].data.sum(1, dtype="f8"))
    if np.abs(wanted - parts["quant_bias"].data).max() > 1:
        yield f"{name}: quant_bias is not round(bias / deq_scale - input_offset * sum of the codes)"


def _step(parts: Mapping[str, Stored], columns: int) -> np.ndarray:
    if "deq_scale" in parts:
        return (parts["deq_scale"].data / parts["input_scale"].data)[:, None]
    scale = parts["weight_scale"].data
    return np.repeat(scale, columns // scale.shape[1], 1)


def _float_by_name(output: Output, linears: Mapping[str, Linear]) -> Iterator[str]:
    """A linear that is not fused is run in float when any FLOAT ``.weight`` key begins with its name."""
    fused = {last for names in FUSED for last in names}
    floats = [key for key, value in output.description.items() if value == "FLOAT" and key.endswith(".weight")]
    for name in linears:
        if type_of(output, name) == "FLOAT" or name.rpartition(".")[2] in fused or EXPERT.fullmatch(name):
            continue
        if clash := next((key for key in floats if key.startswith(name)), None):
            yield f"{name}: {clash} makes it float"


def _fused(output: Output, linears: Mapping[str, Linear]) -> Iterator[str]:
    for parent, group in groupby(sorted(linears), lambda name: name.rpartition(".")[0]):
        lasts = {name.rpartition(".")[2] for name in group}
        for names in FUSED:
            members = [f"{parent}.{last}" for last in names if last in lasts]
            if len({type_of(output, member) for member in members}) > 1:
                yield f"{parent}: {', '.join(names)} are one linear and have several types"
            for part in ("input_scale", "input_offset"):
                found = [output.tensors[f"{one}.{part}"].data for one in members if f"{one}.{part}" in output.tensors]
                if len({value.tobytes() for value in found}) > 1:
                    yield f"{parent}: {', '.join(names)} share one {part} and hold several"


def _experts(output: Output, linears: Mapping[str, Linear]) -> Iterator[str]:
    layers: dict[str, set[str]] = {}
    for name in linears:
        if match := EXPERT.fullmatch(name):
            layers.setdefault(match[1], set()).add(type_of(output, name))
    for layer, types in layers.items():
        if len(types) > 1:
            yield f"{layer}: its experts have the types {sorted(types)}"
        if "W8A8" in types:
            yield f"{layer}: experts cannot be static"
    for name, tensor in output.tensors.items():
        stacked = tensor.data.ndim == 3 and ".experts." in name
        if stacked and layers.get(name[: name.index(".experts.") + 8], {"FLOAT"}) != {"FLOAT"}:
            yield f"{name}: experts of one layer as one tensor beside quantized ones"
