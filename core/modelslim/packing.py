# SPDX-License-Identifier: Apache-2.0
"""Codes of few bits as one dense stream of bits, which is how most formats store them."""

from __future__ import annotations

from math import ceil, gcd

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1 << 18


def pack_bits(codes: Tensor, bits: int, word: torch.dtype = torch.int32) -> Tensor:
    """Pack along the last dimension: code i takes the bits from ``i * bits`` on, the lowest bit first.

    With 2, 4 or 8 bits no code crosses a word; with others some do.

    Args:
        codes: uint8 [..., count], below ``2 ** bits``; or int8, from ``-2 ** (bits - 1)`` on, which are stored as
            ``to_unsigned`` makes them.
        bits: 1 to 8.
        word: integer type of the result. Its words are little-endian parts of the stream.

    Returns:
        ``word`` [..., words]; what is left of the last word is zero.
    """
    per, nbytes = _period(bits)
    odd = -codes.shape[-1] % per
    if bits == 4 and not odd:
        return _words(_pack_pairs(codes), word)
    if codes.dtype == torch.int8:
        codes = to_unsigned(codes, bits)
    groups = _grouped(_filled(codes, odd), per)
    if nbytes == 1:
        packed = groups[..., 0].clone()
        for place in range(1, per):
            packed |= groups[..., place] << (bits * place)
    else:
        stream = groups[..., 0].to(torch.int64)
        for place in range(1, per):
            stream |= groups[..., place].to(torch.int64) << (bits * place)
        packed = stream.unsqueeze(-1).view(torch.uint8)[..., :nbytes].flatten(-2)
    return _words(packed[..., : ceil(codes.shape[-1] * bits / 8)], word)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Two codes of four bits a byte, uint8 [..., count / 2]."""
    codes = codes.contiguous()
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // 2, dtype=torch.uint8)
    # In blocks that stay in the cache of a core; memory does not grow by more.
    blocks = zip(torch.split(codes.view(-1), _BLOCK), torch.split(packed.view(-1), _BLOCK // 2), strict=True)
    for block, target in blocks:
        unsigned = to_unsigned(block, 4) if block.dtype == torch.int8 else block
        # Both codes of a pair come to lie in its low byte, which is all that the conversion keeps: whole words are
        # three times as fast as every other byte.
        pairs = unsigned.view(torch.int16)
        target.copy_((pairs >> 4).bitwise_or_(pairs))
    return packed


def _words(packed: Tensor, word: torch.dtype) -> Tensor:
    """uint8 [..., bytes] as words; what is left of the last one is zero."""
    return _filled(packed, -packed.shape[-1] % word.itemsize).contiguous().view(word)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_bits``.

    Args:
        packed: any integer type [..., words].
        bits: 1 to 8.
        count: number of codes in the last dimension.

    Returns:
        uint8 [..., count].
    """
    per, nbytes = _period(bits)
    stream = packed.contiguous().view(torch.uint8)
    need = ceil(count / per) * nbytes
    groups = _grouped(_filled(stream, need - stream.shape[-1]), nbytes)
    whole = groups if nbytes == 1 else _filled(groups, 8 - nbytes).view(torch.int64)
    mask = (1 << bits) - 1
    codes = torch.cat([((whole >> (bits * place)) & mask).to(torch.uint8) for place in range(per)], -1)
    return codes.flatten(-2)[..., :count]


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 from ``-2 ** (bits - 1)`` on, as uint8 from 0 on: the smallest becomes 0."""
    return codes.view(torch.uint8) + (1 << (bits - 1))


def to_signed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``to_unsigned``: int8."""
    return (codes - (1 << (bits - 1))).view(torch.int8)


def _filled(values: Tensor, count: int) -> Tensor:
    """With so many zeros behind each row, or so many values less."""
    return F.pad(values, (0, count)) if count else values


def _grouped(values: Tensor, size: int) -> Tensor:
    """[..., n * size] -> [..., n, size]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def _period(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes."""
    common = gcd(bits, 8)
    return 8 // common, bits // common
