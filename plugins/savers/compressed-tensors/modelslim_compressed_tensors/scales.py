# SPDX-License-Identifier: Apache-2.0
"""How scales are stored: in the dtype of the model, as exponents, or as float8 shares of one scale for the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from modelslim.api import QuantizedLinear, QuantSpec, from_e8m0, to_e8m0
from modelslim_compressed_tensors.codes import Layout, Parts, groups_of


@dataclass(frozen=True)
class Scales:
    """A way of storing the scales of a weight.

    Attributes:
        layout: the tensors of a weight with so many rows and columns in a model of some dtype.
        encode: makes them.
        decode: the way back: the scale in float32, and that of the whole weight where there is one.
    """

    layout: Callable[[QuantSpec, int, int, torch.dtype], Layout]
    encode: Callable[[QuantizedLinear, torch.dtype], Iterator[tuple[str, Tensor]]]
    decode: Callable[[Parts], tuple[Tensor, Tensor | None]]


def scale_shape(spec: QuantSpec, rows: int, columns: int) -> tuple[int, int]:
    """The shape of ``weight_scale``."""
    return ceil(rows / spec.weight.group_rows), groups_of(spec, columns)


def _held_layout(spec: QuantSpec, rows: int, columns: int, dtype: torch.dtype) -> Layout:
    return {"weight_scale": (dtype, scale_shape(spec, rows, columns))}


def _held(module: QuantizedLinear, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "weight_scale", module.scale.to(dtype)


def _from_held(parts: Parts) -> tuple[Tensor, Tensor | None]:
    return parts["weight_scale"].to(torch.float32), None


def _exponents_layout(spec: QuantSpec, rows: int, columns: int, dtype: torch.dtype) -> Layout:
    return {"weight_scale": (torch.uint8, scale_shape(spec, rows, columns))}


def _exponents(module: QuantizedLinear, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "weight_scale", to_e8m0(module.scale)


def _from_exponents(parts: Parts) -> tuple[Tensor, Tensor | None]:
    return from_e8m0(parts["weight_scale"]), None


def _shares_layout(spec: QuantSpec, rows: int, columns: int, dtype: torch.dtype) -> Layout:
    scale = (torch.float8_e4m3fn, scale_shape(spec, rows, columns))
    return {"weight_scale": scale, "weight_global_scale": (torch.float32, (1,))}


def _shares(module: QuantizedLinear, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    assert module.whole_scale is not None
    yield "weight_scale", (module.scale / module.whole_scale).to(torch.float8_e4m3fn)
    yield "weight_global_scale", 1 / module.whole_scale  # readers divide by it


def _from_shares(parts: Parts) -> tuple[Tensor, Tensor | None]:
    whole = 1 / parts["weight_global_scale"]
    return parts["weight_scale"].to(torch.float32) * whole, whole


HELD = Scales(_held_layout, _held, _from_held)
EXPONENTS = Scales(_exponents_layout, _exponents, _from_exponents)
SHARES = Scales(_shares_layout, _shares, _from_shares)
