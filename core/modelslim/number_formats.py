# SPDX-License-Identifier: Apache-2.0
"""Small floating-point numbers: the nearest float8 or float4 value, its code, and scales that are powers of two.

float8 ``e4m3`` is that of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), without infinities; float4
``e2m1`` and the scale type ``e8m0`` are those of the OCP Microscaling Formats specification 1.0 (2023). Values are
rounded to nearest, ties to the even mantissa, and those beyond the largest one become the largest one.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_LARGEST = 448.0
E2M1_LARGEST = 6.0

_LEAST_EXPONENT = -126  # of a normal float32; e8m0 has one more, which kernels may flush to zero
_LARGEST_EXPONENT = 127


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest float8 values: floating [...] -> float8_e4m3fn [...]."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)


def to_e2m1(values: Tensor) -> Tensor:
    """The nearest float4 values, doubled: floating [...] -> int8 [...] of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.

    Twice a float4 value is an integer, so that a code can be multiplied, and told from others, as it is.
    """
    doubled = (values * 2).clamp_(-12, 12)
    size = doubled.abs()
    # Steps are 1 up to 4, 2 up to 8, and 4 up to 12.
    step = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
    return doubled.div_(step).round_().mul_(step).to(torch.int8)


def e2m1_nibbles(codes: Tensor) -> Tensor:
    """Codes of ``to_e2m1`` as the four bits of the format: int8 [...] -> uint8 [...], sign in bit 3."""
    size = codes.abs().to(torch.int32)
    index = torch.where(size < 5, size, torch.where(size < 7, 5, torch.where(size < 9, 6, 7)))
    return (index + 8 * (codes < 0)).to(torch.uint8)


def from_e2m1_nibbles(nibbles: Tensor) -> Tensor:
    """The way back: uint8 [...], 0 to 15 -> int8 [...]; the negative zero becomes zero."""
    table = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
    return table.to(nibbles.device)[nibbles.to(torch.int64)]


def power_of_two(values: Tensor, up_from: float = 2.0) -> Tensor:
    """The largest power of two that is not above each value, float32; of zero, the least that is normal.

    Args:
        values: floating, not negative, finite.
        up_from: mantissa, in [1, 2), from which the next power is taken; 2 never takes it.
    """
    mantissa, exponent = torch.frexp(values.to(torch.float32))  # mantissa in [0.5, 1)
    exponent = exponent - 1 + (mantissa >= up_from / 2).to(exponent.dtype)
    return _exp2(torch.where(values > 0, exponent, _LEAST_EXPONENT).clamp_(_LEAST_EXPONENT, _LARGEST_EXPONENT))


def to_e8m0(scale: Tensor) -> Tensor:
    """Powers of two as biased exponents: float32 [...] -> uint8 [...], exponent + 127."""
    _, exponent = torch.frexp(scale)
    return (exponent + 126).to(torch.uint8)


def from_e8m0(stored: Tensor) -> Tensor:
    """The way back: uint8 [...] -> float32 [...]; the byte 255 stands for NaN."""
    return _exp2(stored.to(torch.int32) - 127).masked_fill_(stored == 255, torch.nan)


def _exp2(exponent: Tensor) -> Tensor:
    """Powers of two from int32 exponents, -127 to 127, by their bits: a kernel's ``exp2`` need not be exact."""
    bits = torch.where(exponent < _LEAST_EXPONENT, 1 << 22, (exponent + 127) << 23)
    return bits.to(torch.int32).view(torch.float32)
