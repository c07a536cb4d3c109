# SPDX-License-Identifier: Apache-2.0
"""How codes are stored: each in a value of its own, as a stream of bits, or two float4 numbers a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from modelslim.api import (
    QuantizedLinear,
    QuantSpec,
    e2m1_nibbles,
    from_e2m1_nibbles,
    pack_bits,
    to_signed,
    unpack_bits,
)

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a linear, by the last part of the tensor's name."""

Parts = Mapping[str, Tensor]
"""The tensors of a linear, by the last part of their names."""


@dataclass(frozen=True)
class Codes:
    """A way of storing codes, and zero points where there are such.

    Attributes:
        layout: the tensors of a weight with so many rows and columns.
        encode: makes them.
        decode: the way back: codes, and the offset when there is one.
        columns: how many columns the stored weight has at most, from its last size.
    """

    layout: Callable[[QuantSpec, int, int], Layout]
    encode: Callable[[QuantizedLinear], Iterator[tuple[str, Tensor]]]
    decode: Callable[[QuantSpec, Parts], tuple[Tensor, Tensor | None]]
    columns: Callable[[QuantSpec, int], int]

    @property
    def part(self) -> str:
        """Name of the tensor that holds the codes."""
        return "weight" if self is PLAIN else "weight_packed"


def groups_of(spec: QuantSpec, columns: int) -> int:
    """Number of scales in a row of the weight."""
    return ceil(columns / spec.weight.group_size) if spec.weight.group_size else 1


def words(count: int, spec: QuantSpec) -> int:
    """How many int32 hold so many codes."""
    return ceil(count * spec.weight.bits / 32)


def _plain_layout(spec: QuantSpec, rows: int, columns: int) -> Layout:
    return {"weight": (torch.int8 if spec.weight.is_integer else torch.float8_e4m3fn, (rows, columns))}


def _plain(module: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    yield "weight", module.codes


def _from_plain(spec: QuantSpec, parts: Parts) -> tuple[Tensor, Tensor | None]:
    return parts["weight"], None


def _words_layout(spec: QuantSpec, rows: int, columns: int) -> Layout:
    tensors: Layout = {
        "weight_packed": (torch.int32, (rows, words(columns, spec))),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.weight.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (words(rows, spec), groups_of(spec, columns)))
    return tensors


def _words(module: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    bits = module.spec.weight.bits
    yield "weight_packed", pack_bits(module.codes, bits)
    yield "weight_shape", torch.tensor(module.codes.shape)
    if module.offset is not None:
        # Along the outputs, while the codes are packed along the inputs.
        yield "weight_zero_point", pack_bits(module.offset.t(), bits).t().contiguous()


def _from_words(spec: QuantSpec, parts: Parts) -> tuple[Tensor, Tensor | None]:
    bits = spec.weight.bits
    rows, columns = parts["weight_shape"].tolist()
    codes = to_signed(unpack_bits(parts["weight_packed"], bits, columns), bits)
    if "weight_zero_point" not in parts:
        return codes, None
    stored = parts["weight_zero_point"].t().contiguous()
    return codes, to_signed(unpack_bits(stored, bits, rows), bits).t().contiguous()


def _nibbles_layout(spec: QuantSpec, rows: int, columns: int) -> Layout:
    return {"weight_packed": (torch.uint8, (rows, columns // 2))}


def _nibbles(module: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    yield "weight_packed", pack_bits(e2m1_nibbles(module.codes), 4, torch.uint8)


def _from_nibbles(spec: QuantSpec, parts: Parts) -> tuple[Tensor, Tensor | None]:
    stored = parts["weight_packed"]
    return from_e2m1_nibbles(unpack_bits(stored, 4, stored.shape[1] * 2)), None


PLAIN = Codes(_plain_layout, _plain, _from_plain, lambda spec, width: width)
WORDS = Codes(_words_layout, _words, _from_words, lambda spec, width: width * 32 // spec.weight.bits)
NIBBLES = Codes(_nibbles_layout, _nibbles, _from_nibbles, lambda spec, width: width * 2)
