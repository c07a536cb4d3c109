# SPDX-License-Identifier: Apache-2.0
"""The linears of a source checkpoint by the names that a result must give them, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from ascend_output import Linear, Output, Stored, decode, type_of


class Stack(NamedTuple):
    """How a family stores all experts of a layer as one tensor.

    Attributes:
        first, second: ends of the names of the two tensors.
        transposed: True for [experts, in, out].
        interleaved: True when the rows of gate and up alternate.
    """

    first: str
    second: str
    transposed: bool
    interleaved: bool


STACKS: Mapping[str, Stack] = {
    "gpt_oss": Stack("experts.gate_up_proj", "experts.down_proj", transposed=True, interleaved=True),
    "qwen3_vl_moe": Stack("experts.gate_up_proj", "experts.down_proj", transposed=True, interleaved=False),
    "granitemoe": Stack("input_linear.weight", "output_linear.weight", transposed=False, interleaved=False),
    "granitemoehybrid": Stack("input_linear.weight", "output_linear.weight", transposed=False, interleaved=False),
}
"""All other families store one tensor per expert and linear."""


def linears_of(source: Mapping[str, Stored], model_type: str) -> dict[str, Linear]:
    """Every matrix of a checkpoint that could be a linear, the stacked experts taken apart."""
    linears = {}
    stacked: set[str] = set()
    for key, name, weight, bias_key, bias in _stacked(source, model_type):
        sources = frozenset({key} if bias is None else {key, bias_key})
        linears[name] = Linear(weight, bias, sources)
        stacked.update(sources)
    for key, tensor in source.items():
        name = key.removesuffix(".weight")
        if key not in stacked and name != key and tensor.data.ndim == 2:
            added = source.get(f"{name}.bias")
            names = {key} if added is None else {key, f"{name}.bias"}
            linears[name] = Linear(tensor.data, None if added is None else added.data, frozenset(names))
    return linears


def find_unaccounted(output: Output, source: Mapping[str, Stored], linears: Mapping[str, Linear]) -> Iterator[str]:
    """Source tensors that are neither quantized nor copied to the bit, and output tensors that come from nowhere."""
    quantized = {name for name in linears if type_of(output, name) not in ("", "FLOAT")}
    replaced = frozenset().union(*(linears[name].sources for name in quantized))
    for key, tensor in source.items():
        copy = output.tensors.get(key)
        if key in replaced:
            continue
        if copy is None:
            yield f"{key}: neither quantized nor copied"
        elif copy.dtype != tensor.dtype or copy.data.tobytes() != tensor.data.tobytes():
            yield f"{key}: changed on the way"
        elif output.description.get(key) != "FLOAT":
            yield f"{key}: copied and described as {output.description.get(key)}"
    for key in output.tensors:
        if key not in source and key.rpartition(".")[0] not in quantized:
            yield f"{key}: comes from nowhere"


def dequantized(output: Output, source: Mapping[str, Stored], model_type: str) -> dict[str, np.ndarray]:
    """The weights that a quantized checkpoint stands for, float32, under the names and in the layout of the source."""
    result = {key: tensor.data for key, tensor in source.items()}
    stacked = set()
    for key, name, *_ in _stacked(source, model_type):
        stacked.add(name)
        if type_of(output, name) != "FLOAT":
            result[key] = _restack(output, source[key].data.shape, key, STACKS[model_type])
    for name in linears_of(source, model_type).keys() - stacked:
        if type_of(output, name) not in ("", "FLOAT"):
            result[f"{name}.weight"] = decode(output, name)
    return result


def _stacked(
    source: Mapping[str, Stored], model_type: str
) -> Iterator[tuple[str, str, np.ndarray, str, np.ndarray | None]]:
    """Stored name, name, weight, stored name of the bias, and bias of every linear of every stacked expert."""
    stack = STACKS.get(model_type)
    for key, tensor in source.items():
        if stack is None or tensor.data.ndim < 3 or not key.endswith((stack.first, stack.second)):
            continue
        weights = tensor.data.swapaxes(1, 2) if stack.transposed else tensor.data
        bias_key = f"{key}_bias"
        for expert, weight in enumerate(weights):
            for part, rows in _rows(key, stack, len(weight)).items():
                bias = source[bias_key].data[expert][rows] if bias_key in source else None
                yield key, f"{_parent(key, stack)}.{expert}.{part}", weight[rows], bias_key, bias


def _restack(output: Output, shape: tuple[int, ...], key: str, stack: Stack) -> np.ndarray:
    made = np.empty(shape, "<f4")
    turned = made.swapaxes(1, 2) if stack.transposed else made
    for expert, target in enumerate(turned):
        for part, rows in _rows(key, stack, len(target)).items():
            target[rows] = decode(output, f"{_parent(key, stack)}.{expert}.{part}")
    return made


def _rows(key: str, stack: Stack, count: int) -> dict[str, slice]:
    if key.endswith(stack.second):
        return {"down_proj": slice(None)}
    if stack.interleaved:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return {"gate_proj": slice(0, count // 2), "up_proj": slice(count // 2, None)}


def _parent(key: str, stack: Stack) -> str:
    end = stack.second if key.endswith(stack.second) else stack.first
    before = key.removesuffix(end).rstrip(".")
    return f"{before}.experts"
