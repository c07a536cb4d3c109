# SPDX-License-Identifier: Apache-2.0
"""Two rows of 4-bit codes in one, as the kernel of W4A8_DYNAMIC wants them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 64


def pack_rows(codes: Tensor) -> Tensor:
    """Two neighbouring rows into one: row 2r in the low nibble, row 2r+1 in the high one.

    Args:
        codes: int8 [rows, columns], -8..7, an even number of rows.

    Returns:
        int8 [rows / 2, columns].
    """
    packed = torch.empty(codes.shape[0] // 2, codes.shape[1], dtype=torch.int8)
    # In blocks that stay in the cache of a core. A sum that overflows drops the same bits as a shift, and is faster.
    for block, target in zip(torch.split(codes, _BLOCK_ROWS), torch.split(packed, _BLOCK_ROWS // 2), strict=True):
        torch.add(block[0::2] & 0x0F, block[1::2], alpha=16, out=target)
    return packed


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of ``pack_rows``."""
    # Shifting an int8 right repeats its sign, which makes -8..7 of a nibble in the upper half.
    codes = torch.stack(((packed << 4) >> 4, packed >> 4), 1)
    return codes.view(-1, packed.shape[1])
