# SPDX-License-Identifier: Apache-2.0
"""Packing of 4-bit codes, as the two engine kernels want them, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(codes: Tensor) -> Tensor:
    """Two neighbouring rows into one: row 2r in the low nibble, row 2r+1 in the high one.

    Args:
        codes: int8 [rows, columns], -8..7, an even number of rows.

    Returns:
        int8 [rows / 2, columns].
    """
    return (codes[0::2] & 0x0F) | (codes[1::2] << 4)


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of ``pack_rows``."""
    # Shifting an int8 right repeats its sign, which makes -8..7 of a nibble in the upper half.
    codes = torch.stack(((packed << 4) >> 4, packed >> 4), 1)
    return codes.view(-1, packed.shape[1])


def pack_words(codes: Tensor) -> Tensor:
    """Eight neighbouring columns into one word: ``code + 8`` of column i of the eight at bit 4i.

    Args:
        codes: int8 [rows, columns], -8..7, columns a multiple of 8.

    Returns:
        int32 [rows, columns / 8].
    """
    nibbles = (codes + 8).view(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32)


def unpack_words(packed: Tensor) -> Tensor:
    """The inverse of ``pack_words``."""
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 0x0F, pairs >> 4), -1)
    return nibbles.view(packed.shape[0], -1).view(torch.int8) - 8
