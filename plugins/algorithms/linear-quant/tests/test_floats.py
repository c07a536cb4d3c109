# SPDX-License-Identifier: Apache-2.0
"""Floating weights against a search over every value of their grid, in float64, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from modelslim.api import TensorSpec
from modelslim_linear_quant import floats
from modelslim_linear_quant.config import WeightMethod

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)
NVFP4 = TensorSpec("nvfp4", "per_block", group_size=16)
FP8 = TensorSpec("fp8_e4m3", "per_channel")
FP8_BLOCK = TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128)


def error(block: Tensor, scale: float, grid: Tensor, energy: Tensor | None) -> float:
    exact = block.double() / scale
    index = (exact.abs().unsqueeze(-1) - grid).abs().argmin(-1)
    lost = (torch.copysign(grid[index], exact) * scale - block.double()).square()
    return float((lost if energy is None else lost * energy.double()).sum())


def floor(value: float) -> float:
    return 2.0 ** math.floor(math.log2(value))


def ceil(value: float) -> float:
    return 2.0 ** math.ceil(math.log2(value))


def mxfp4_minmax(size: float) -> float:
    power = floor(size)
    return (2 * power if size / power >= 1.75 else power) / 4


CANDIDATES: Sequence[tuple[TensorSpec, str, Callable[[float], Sequence[float]]]] = [
    (MXFP8, "minmax", lambda size: [floor(size) / 256]),
    (MXFP8, "mse_round", lambda size: [floor(size) / 256, floor(size) / 128]),
    (MXFP8, "mse", lambda size: [floor(size) / 256, floor(size) / 128, floor(size) / 512]),
    (MXFP4, "minmax", lambda size: [mxfp4_minmax(size)]),
    (MXFP4, "mse", lambda size: [mxfp4_minmax(size) * factor for factor in (1, 2, 0.5)]),
    (MXFP4, "fouroversix", lambda size: [2.0 ** round(math.log2(size / bound)) for bound in (6, 4)]),
    (MXFP4, "ceil_x", lambda size: [ceil(size / 7.25)]),
]


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 96, generator=generator) * torch.rand(24, 1, generator=generator)


@pytest.fixture
def energy() -> Tensor:
    return torch.rand(96, generator=torch.Generator().manual_seed(1)) * 5 + 0.1


@pytest.mark.parametrize(("spec", "name", "candidates"), CANDIDATES, ids=lambda one: getattr(one, "dtype", None) or one)
@pytest.mark.parametrize("weighed", [True, False])
def test_each_block_has_the_best_of_the_scales_that_its_method_tries(
    spec: TensorSpec,
    name: str,
    candidates: Callable[[float], Sequence[float]],
    weighed: bool,
    weight: Tensor,
    energy: Tensor,
) -> None:
    result = floats.quantize(weight, spec, WeightMethod(name), energy if weighed else None)
    grid = E4M3 if spec.dtype == "mxfp8" else E2M1
    for row in range(0, 24, 5):
        for place in range(3):
            inputs = slice(32 * place, 32 * place + 32)
            block, counts = weight[row, inputs], energy[inputs] if weighed else None
            tried = candidates(float(block.abs().max()))
            errors = [error(block, scale, grid, counts) for scale in tried]
            scale = float(result.scale[row, place])
            assert scale in tried
            assert error(block, scale, grid, counts) <= min(errors) * (1 + 1e-5)


def test_ceil_x_searches_one_bound_for_the_whole_weight(weight: Tensor) -> None:
    method = WeightMethod("ceil_x", enable_search=True)
    found = floats.quantize(weight, MXFP4, method)
    sizes = weight.view(24, 3, 32).abs().amax(-1)
    totals = {}
    for step in range(25):
        bound = 6 + step * 0.25
        scales = [[ceil(float(size) / bound) for size in row] for row in sizes]
        totals[bound] = sum(
            error(weight[row, 32 * place : 32 * place + 32], scales[row][place], E2M1, None)
            for row in range(24)
            for place in range(3)
        )
    best = min(totals, key=lambda bound: totals[bound])
    assert found.scale.tolist() == [[ceil(float(size) / best) for size in row] for row in sizes]


def test_fouroversix_of_nvfp4_is_never_worse_than_minmax(weight: Tensor) -> None:
    plain, chosen = (
        floats.quantize(weight, NVFP4, WeightMethod(name)).dequantize() for name in ("minmax", "fouroversix")
    )
    blocks = [(one - weight).view(24, -1, 16).double().square().sum(-1) for one in (plain, chosen)]
    assert (blocks[1] <= blocks[0] * (1 + 1e-6)).all()
    assert (blocks[1] < blocks[0] * 0.99).any()


@pytest.mark.parametrize("spec", [FP8, FP8_BLOCK, MXFP8, MXFP4, NVFP4], ids=str)
def test_experts_are_quantized_each_for_itself(spec: TensorSpec) -> None:
    weight = torch.randn(3, 160, 192, generator=torch.Generator().manual_seed(2))
    whole = floats.quantize(weight, spec, WeightMethod("minmax"))
    for expert in range(3):
        alone = floats.quantize(weight[expert], spec, WeightMethod("minmax"))
        assert torch.equal(whole.scale[expert], alone.scale)
        assert torch.equal(whole.codes[expert].view(torch.uint8), alone.codes.view(torch.uint8))
        if alone.whole_scale is not None:
            assert whole.whole_scale is not None
            assert torch.equal(whole.whole_scale[expert], alone.whole_scale)


def test_linears_that_an_engine_fuses_can_share_the_scale_of_the_whole(weight: Tensor) -> None:
    largest = torch.tensor([17.0])
    result = floats.quantize(weight, NVFP4, WeightMethod("minmax"), whole=largest)
    assert result.whole_scale is not None
    assert result.whole_scale.item() == pytest.approx(17 / (448 * 6))


@pytest.mark.parametrize("spec", [FP8, FP8_BLOCK, MXFP8, MXFP4, NVFP4], ids=str)
def test_rows_that_do_not_fit_into_the_cache_at_once_make_no_difference(
    spec: TensorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    at_once = floats.quantize(weight, spec, WeightMethod("minmax"))
    monkeypatch.setattr(floats, "_BLOCK", 5000)
    in_parts = floats.quantize(weight, spec, WeightMethod("minmax"))
    assert torch.equal(at_once.scale, in_parts.scale)
    assert torch.equal(at_once.codes.view(torch.uint8), in_parts.codes.view(torch.uint8))
