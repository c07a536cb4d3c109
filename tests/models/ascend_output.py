# SPDX-License-Identifier: Apache-2.0
"""An ascendv1 checkpoint read with numpy alone, independent of the project: its files, and what its codes stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "BOOL": "?"}


@dataclass(frozen=True)
class Stored:
    """A tensor with its dtype in the words of safetensors; bfloat16 is widened to float32."""

    dtype: str
    data: np.ndarray


@dataclass
class Output:
    """A checkpoint as it lies on the disk."""

    tensors: dict[str, Stored]
    description: dict[str, Any]
    config: dict[str, Any]
    index: dict[str, Any]
    files: set[str]


@dataclass(frozen=True)
class Linear:
    """What the source says of a linear: weight [N, K] and bias [N], float32, and the tensors that hold them."""

    weight: np.ndarray
    bias: np.ndarray | None
    sources: frozenset[str]


def read_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        data = np.frombuffer(raw[start + first : start + last], DTYPES.get(entry["dtype"], "<u2"))
        if entry["dtype"] == "BF16":
            data = (data.astype("<u4") << 16).view("<f4")
        tensors[name] = Stored(entry["dtype"], data.reshape(entry["shape"]))
    return tensors


def read_output(directory: Path) -> Output:
    """A whole checkpoint."""

    def document(name: str) -> dict[str, Any]:
        file = directory / name
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    tensors: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(read_tensors(file))
    return Output(
        tensors,
        document("quant_model_description.json"),
        document("config.json"),
        document("quant_model_weights.safetensors.index.json"),
        {file.name for file in directory.iterdir()},
    )


def type_of(output: Output, linear: str) -> str:
    """The type of a linear; empty when the description does not name it."""
    names = (f"{linear}.weight", f"{linear}.weight_packed")
    return next((str(output.description[name]) for name in names if name in output.description), "")


def decode(output: Output, name: str) -> np.ndarray:
    """The weight of a quantized linear as the engine multiplies with it, float32 [N, K]."""
    parts = parts_of(output, name)
    type_ = type_of(output, name)
    if type_ == "W4A16":
        words = parts["weight_packed"].data.view("<u4")
        codes = (words[:, :, None] >> np.arange(0, 32, 4, dtype="<u4")) & 15
        codes = codes.reshape(len(words), -1).astype("<f4") - 8
    elif type_ == "W4A8_DYNAMIC":
        pairs = parts["weight"].data.view("u1")
        nibbles = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1, pairs.shape[1]).astype("<i4")
        codes = np.where(nibbles > 7, nibbles - 16, nibbles).astype("<f4")
    else:
        codes = parts["weight"].data.astype("<f4")
    if type_ == "W8A8":
        return codes * (parts["deq_scale"].data / parts["input_scale"].data)[:, None]
    scale = parts["weight_scale"].data
    groups = codes.reshape(len(codes), scale.shape[1], -1)
    if type_ in ("W8A16", "W4A16") and "weight_offset" in parts:
        groups = groups + parts["weight_offset"].data[:, :, None]
    return (groups * scale[:, :, None]).reshape(codes.shape)


def parts_of(output: Output, name: str) -> dict[str, Stored]:
    """The tensors of a linear by the last part of their names."""
    size = len(name) + 1
    return {key[size:]: tensor for key, tensor in output.tensors.items() if key.rpartition(".")[0] == name}
