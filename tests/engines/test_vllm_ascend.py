# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own configuration and scheme classes read our ascendv1 checkpoints through vLLM's loader.

Its operators are stand-ins by their documented formulas: what is shown is that names, types, dtypes and shapes are
those that the engine wants, and that its arithmetic on our tensors is the one that we simulate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from agreement import divergences_in_step, simulated, watched
from conftest import INT8, TOKEN, QConfig, Quantize, Read, TinyFactory
from torch import Tensor, nn

from modelslim.quantized import QuantizedLinear

STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
SCHEMES: Mapping[str, tuple[str, QConfig]] = {
    "W8A8_DYNAMIC": ("AscendW8A8DynamicLinearMethod", {"act": TOKEN, "weight": INT8}),
    "W8A8": ("AscendW8A8LinearMethod", {"act": STATIC, "weight": INT8}),
    "W8A16": ("AscendW8A16LinearMethod", {"weight": INT8}),
    "W8A16 asymmetric": ("AscendW8A16LinearMethod", {"weight": {**INT8, "symmetric": False}}),
}
BOUNDS = {"bfloat16": (1e-3, 2e-3), "float16": (3e-4, 1e-4)}
"""By dtype: relative error of a linear's output, and KL of the model.

A rounding to the dtype may fall elsewhere, and W8A8 rounds a bias to a whole number of its scale.
"""
CASES = [(scheme, dtype) for scheme in SCHEMES for dtype in BOUNDS]
PROMPTS = [[0, 17, 300, 41, 8, 99, 256, 3, 77, 120], [5, 411, 23, 23, 68]]


@pytest.fixture(scope="module")
def results(tiny_qwen2: TinyFactory, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the engine made of every case."""
    jobs = {
        f"{scheme} {dtype}": {
            "model": quantize(tiny_qwen2(dtype), "ascendv1_saver", SCHEMES[scheme][1]),
            "dtype": dtype,
            "prompts": PROMPTS,
            "watched": watched(2),
        }
        for scheme, dtype in CASES
    }
    return read_with_vllm(jobs, ascend=True)


@pytest.mark.parametrize(("scheme", "dtype"), CASES)
def test_the_engine_loads_the_scheme_and_computes_what_we_simulate(
    scheme: str, dtype: str, results: Mapping[str, Any], tiny_qwen2: TinyFactory
) -> None:
    result = results[f"{scheme} {dtype}"]
    assert "error" not in result, result["error"]
    assert {result["kernels"][name] for name in result["watched"]} == {SCHEMES[scheme][0]}
    model = simulated(result, tiny_qwen2(dtype))
    if scheme == "W8A8":
        multiply_by_the_reciprocal(model, getattr(torch, dtype))
    kls, error = divergences_in_step(result, model)
    assert error < BOUNDS[dtype][0]
    assert max(kls) < BOUNDS[dtype][1]


def multiply_by_the_reciprocal(model: nn.Module, dtype: torch.dtype) -> None:
    """Quantize static inputs as the engine does without a compiled graph: times 1 / input_scale, in the model's dtype.

    The scale of the results stays that of the checkpoint.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.input_scale is not None:
            module._quantize_input = partial(_codes, module, (1 / module.input_scale.to(dtype)).float())  # type: ignore[method-assign]


def _codes(module: QuantizedLinear, reciprocal: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert module.input_scale is not None and module.input_offset is not None
    codes = (rows * reciprocal).add_(module.input_offset).round_().clamp_(-128, 127).to(torch.int8)
    return codes, module.input_scale, module.input_offset
