# SPDX-License-Identifier: Apache-2.0
"""Block-wise float8 checkpoints: codes float8_e4m3, one float32 scale for each block of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelslim.api import DecodedTensor, ModelError, StoredTensor

SCALE = "_scale_inv"
"""Ends the name of a weight's scales; despite it they are what the codes are multiplied with."""


def block_size(quantization: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, from ``quantization_config``; None when that describes another layout."""
    if not quantization or quantization.get("quant_method") != "fp8" or not quantization.get("weight_block_size"):
        return None
    rows, columns = quantization["weight_block_size"]
    return rows, columns


def decoded_tensors(
    tensors: Mapping[str, StoredTensor], block: tuple[int, int], dtype: torch.dtype
) -> dict[str, DecodedTensor]:
    """The float tensors of a checkpoint, by name.

    Args:
        tensors: all stored tensors.
        block: rows and columns of a block.
        dtype: what the float tensors become.

    Raises:
        ModelError: a float8 weight has no scales, their number does not fit, or scales belong to nothing.
    """
    decoded: dict[str, DecodedTensor] = {}
    problems: list[str] = []
    for name, stored in tensors.items():
        is_scale = name.endswith(SCALE)
        if is_scale and (name.removesuffix(SCALE) not in tensors or not _is_float8(tensors[name.removesuffix(SCALE)])):
            problems.append(f"{stored.file}: {name} belongs to no float8 weight")
        if not _is_float8(stored):
            continue
        scale = tensors.get(f"{name}{SCALE}")
        blocks = tuple(-(-size // edge) for size, edge in zip(stored.shape, block, strict=False))
        if scale is None:
            problems.append(f"{stored.file}: {name} holds float8 codes, and there is no {name}{SCALE}")
        elif len(stored.shape) != 2 or scale.shape != blocks:
            problems.append(
                f"{scale.file}: {scale.name} has the shape {list(scale.shape)}; a weight {list(stored.shape)} in "
                f"blocks of {list(block)} has {list(blocks)}"
            )
        else:
            decode = partial(_decode, block, dtype)
            decoded[name] = DecodedTensor((name, scale.name), str(dtype).removeprefix("torch."), stored.shape, decode)
    if problems:
        more = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise ModelError(
            f"{problems[0]}{more}",
            hint="the download is incomplete, or the weights and config.json (quantization_config) belong to different "
            "models",
        )
    return decoded


def _is_float8(stored: StoredTensor) -> bool:
    return stored.dtype == "F8_E4M3"


def dequantize(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The product of codes and scales in float32, rounded once to ``dtype``.

    Args:
        codes: float8 [out, in].
        scale: float32 [blocks of rows, blocks of columns].
        block: rows and columns of a block; those at the end may be smaller.
        dtype: of the result.

    Returns:
        [out, in].
    """
    rows, columns = block
    weight = torch.empty(codes.shape, dtype=dtype)
    # By rows of blocks, so that memory holds no second copy in float32.
    parts = zip(torch.split(codes, rows), torch.split(weight, rows), scale.to(torch.float32), strict=True)
    for part, target, factors in parts:
        target.copy_(part.to(torch.float32) * factors.repeat_interleave(columns)[: codes.shape[1]])
    return weight


def _decode(block: tuple[int, int], dtype: torch.dtype, tensors: list[Tensor]) -> Tensor:
    codes, scale = tensors
    return dequantize(codes, scale, block, dtype)
