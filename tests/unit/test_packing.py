# SPDX-License-Identifier: Apache-2.0
"""Packed codes against arithmetic on Python's integers, which have no words."""

from __future__ import annotations

import pytest
import torch

from modelslim.api import pack_bits, to_signed, to_unsigned, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 32, 33, 50])
@pytest.mark.parametrize("word", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_packed_bits_are_the_number_that_they_spell(bits: int, count: int, word: torch.dtype) -> None:
    codes = torch.randint(
        0, 1 << bits, (2, 3, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8
    )

    packed = pack_bits(codes, bits, word)

    assert packed.dtype == word
    assert packed.shape == (2, 3, -(-count * bits // (8 * word.itemsize)))
    for row, words in zip(codes.view(-1, count).tolist(), packed.view(6, -1), strict=True):
        expected = sum(code << (bits * place) for place, code in enumerate(row))
        spelled = sum(
            (value % (1 << 8 * word.itemsize)) << (8 * word.itemsize * i) for i, value in enumerate(words.tolist())
        )
        assert spelled == expected
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_is_shifted_there_and_back(bits: int) -> None:
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)
    assert to_unsigned(codes, bits).tolist() == list(range(1 << bits))
    assert torch.equal(to_signed(to_unsigned(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 16, 37])
def test_signed_codes_are_shifted_while_they_are_packed(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, count), generator=generator, dtype=torch.int8)
    unpacked = unpack_bits(pack_bits(codes, bits), bits, count)
    assert torch.equal(unpacked.to(torch.int16), codes.to(torch.int16) + (1 << (bits - 1)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_codes_of_more_than_a_block(dtype: torch.dtype) -> None:
    low = 0 if dtype == torch.uint8 else -8
    codes = torch.randint(low, low + 16, (3, 200_008), generator=torch.Generator().manual_seed(0), dtype=dtype)
    unsigned = codes.to(torch.int32) - low
    assert torch.equal(pack_bits(codes, 4, torch.uint8).int(), unsigned[:, ::2] | unsigned[:, 1::2] << 4)


def test_codes_need_not_be_contiguous() -> None:
    codes = torch.randint(0, 16, (8, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.t(), 4), pack_bits(codes.t().contiguous(), 4))
    packed = pack_bits(codes, 4)
    assert torch.equal(unpack_bits(packed.t().contiguous().t(), 4, 24), codes)


def test_packing_leaves_the_codes_alone() -> None:
    codes = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = codes.clone()
    pack_bits(codes, 8).zero_()
    unpack_bits(codes, 8, 16).zero_()
    assert torch.equal(codes, before)
