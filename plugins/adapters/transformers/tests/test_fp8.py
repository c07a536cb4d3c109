# SPDX-License-Identifier: Apache-2.0
"""Dequantization in blocks against float64, and what is taken for such a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelslim_transformers.fp8 import block_size, dequantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 257), (300, 40)], ids=str)
def test_every_code_times_its_scale_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0  # not a number
    weight = codes.view(torch.float8_e4m3fn)
    scale = torch.rand((-(-shape[0] // 128), -(-shape[1] // 128)), generator=generator) * 1e-2
    actual = dequantize(weight, scale, (128, 128), dtype)
    assert (actual.dtype, actual.shape) == (dtype, shape)
    values = weight.to(torch.float64)
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            # A product of 4 and 24 bits is exact in float64, so that one rounding to float32 is left.
            values[row : row + 128, column : column + 128] *= scale[row // 128, column // 128].item()
    assert torch.equal(actual, values.to(torch.float32).to(dtype))


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, (128, 64)),
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "fbgemm_fp8", "weight_block_size": [128, 128]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_only_block_wise_float8_is_recognized(quantization: Any, expected: tuple[int, int] | None) -> None:
    assert block_size(quantization) == expected
