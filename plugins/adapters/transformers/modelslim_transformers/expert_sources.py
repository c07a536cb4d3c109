# SPDX-License-Identifier: Apache-2.0
"""Where the weights of fused experts lie in a checkpoint: one tensor per expert, or stacked, either way round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from modelslim.api import ExpertLinear, ModelError, WeightSource

Convert = Callable[[list[Tensor]], Tensor]


def per_expert(linear: ExpertLinear, keys: Sequence[Sequence[str]]) -> WeightSource:
    """The source of a weight whose experts are stored one by one.

    Args:
        linear: the module that holds it.
        keys: stored names, [part][expert].
    """

    def convert(tensors: list[Tensor]) -> Tensor:
        weight = torch.empty(linear.weight.shape, dtype=tensors[0].dtype)
        waiting = iter(range(len(tensors)))
        for target in weight:
            for rows in linear.parts.values():
                index = next(waiting)
                # torch would stretch a tensor of one row over all of them.
                if target[rows].shape != tensors[index].shape:
                    raise ModelError(
                        f"an expert's weight has the shape {list(tensors[index].shape)}, config.json asks for "
                        f"{list(target[rows].shape)}",
                        hint="weights and config.json belong to different models",
                    )
                target[rows] = tensors[index]
                tensors[index] = tensors[index][:0]  # not held longer than needed
        return weight

    by_expert = list(zip(*keys, strict=True))
    names = tuple(tuple(key.removesuffix(".weight") for key in expert) for expert in by_expert)
    return WeightSource(tuple(key for expert in by_expert for key in expert), convert, names)


def stacked(linear: ExpertLinear, key: str, is_transposed: bool) -> WeightSource:
    """The source of a weight whose experts are stored as one tensor.

    Args:
        linear: the module that holds it.
        key: its stored name.
        is_transposed: True when it is stored as [experts, in, out].
    """
    convert: Convert | None = _transpose if is_transposed else None
    return WeightSource((key,), convert, _names(linear, key))


def is_stored_transposed(
    shapes: Mapping[str, tuple[int, ...]], linears: Mapping[str, ExpertLinear], keys: Mapping[str, str]
) -> bool:
    """True when a layer's stacked experts are stored as [experts, in, out], read off their shapes.

    A square weight fits either way; the other one of the layer, which cannot be square as well, tells.

    Args:
        shapes: of all stored tensors.
        linears: the two linears of the layer by name.
        keys: their stored names.
    """
    for name, linear in linears.items():
        if linear.out_features != linear.in_features and name in keys:
            return shapes[keys[name]] == (linear.experts, linear.in_features, linear.out_features)
    return False


def _names(linear: ExpertLinear, key: str) -> tuple[tuple[str, ...], ...]:
    """Names for the linears of each expert, as checkpoints with separate experts have them."""
    parent = key.removesuffix(".weight").rpartition(".")[0]
    if parent.rpartition(".")[2] != "experts":
        parent = f"{parent}.experts"
    return tuple(tuple(f"{parent}.{expert}.{part}" for part in linear.parts) for expert in range(linear.experts))


def _transpose(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2).contiguous()
