# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's scheme classes for experts hold the weights that we wrote, after vLLM's loader and their own repacking.

Their kernels are not run: the class and this vLLM call each other differently, and the operators have no stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INT8, TOKEN, QConfig, Quantize, Read
from safetensors.torch import load_file
from torch import Tensor

from modelslim.quantized import QuantizedExperts
from modelslim.saved import load_model

DYNAMIC: QConfig = {"act": TOKEN, "weight": INT8}
INT4 = {**INT8, "dtype": "int4"}
GROUPED = {"scope": "per_group", "dtype": "int4", "symmetric": True, "method": "minmax", "group_size": 32}
EXPERTS: Mapping[str, QConfig] = {
    "W8A8_DYNAMIC": DYNAMIC,
    "W4A8_DYNAMIC": {"act": TOKEN, "weight": INT4},
    "W4A16": {"weight": GROUPED},
    "W4A16 asymmetric": {"weight": {**GROUPED, "symmetric": False}},
}
CLASSES = {"W8A8_DYNAMIC": "W8A8Dynamic", "W4A8_DYNAMIC": "W4A8Dynamic", "W4A16": "W4A16"}
PARTS: Mapping[str, tuple[str, ...]] = {
    "W8A8_DYNAMIC": ("weight", "weight_scale"),
    "W4A8_DYNAMIC": ("weight", "weight_scale", "scale_bias"),
    "W4A16": ("weight_packed", "weight_scale", "weight_offset"),
}
PLACE = "model.layers.1.mlp.experts.routed_experts"
STACKS = {"w13": "gate_up_proj", "w2": "down_proj"}


@pytest.fixture(scope="module")
def results(tiny_qwen3_moe: Path, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the engine made of every scheme."""
    jobs = {
        scheme: {
            "model": quantize(tiny_qwen3_moe, "ascendv1_saver", DYNAMIC, experts=qconfig),
            "dtype": "bfloat16",
            "kept": [PLACE],
        }
        for scheme, qconfig in EXPERTS.items()
    }
    return read_with_vllm(jobs, ascend=True)


@pytest.mark.parametrize("scheme", EXPERTS)
def test_the_experts_in_the_engine_are_those_that_we_wrote(
    scheme: str, results: Mapping[str, Any], tiny_qwen3_moe: Path
) -> None:
    result = results[scheme]
    assert "error" not in result, result["error"]
    type_ = scheme.split()[0]
    assert result["kernels"][PLACE] == f"Ascend{CLASSES[type_]}FusedMoEMethod"
    model = load_model(Path(result["model"]), tiny_qwen3_moe, device="cpu")
    held = load_file(result["tensors"])
    for stack, name in STACKS.items():
        module = model.get_submodule(f"model.layers.1.mlp.experts.{name}")
        assert isinstance(module, QuantizedExperts)
        parts = {part: held[f"{PLACE}.{stack}_{part}"] for part in PARTS[type_]}
        ours = torch.stack([module.linear(expert).weight.dequantize() for expert in range(module.experts)])
        assert torch.equal(WEIGHTS[type_](parts), ours.transpose(1, 2))
        if type_ == "W4A8_DYNAMIC":
            # The kernel reads a code as one from 0 to 15; this undoes the 8 by which all are too large.
            torch.testing.assert_close(parts["scale_bias"], 8 * ours.sum(2), rtol=1e-5, atol=1e-5)


def _channels(parts: Mapping[str, Tensor]) -> Tensor:
    """Weights float32 [experts, in, out] of codes int8 [experts, in, out] and scales [experts, out]."""
    return parts["weight"].float() * parts["weight_scale"].float().unsqueeze(1)


def _bytes(parts: Mapping[str, Tensor]) -> Tensor:
    """The same where a byte holds two outputs, the first in its lower half, and int64 the bits of a scale."""
    pairs = parts["weight"].view(torch.int8)
    codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), -1).flatten(2)
    scales = parts["weight_scale"].to(torch.int32).view(torch.float32)
    return codes.float() * scales.view(len(codes), 1, -1)


def _words(parts: Mapping[str, Tensor]) -> Tensor:
    """The same where 32 bits hold eight outputs, with scales and added offsets [experts, groups, out]."""
    packed = parts["weight_packed"].unsqueeze(-1)
    codes = ((packed << torch.arange(28, -4, -4, dtype=torch.int32)) >> 28).flatten(2).float()
    scale, offset = (
        parts[part].float().repeat_interleave(codes.shape[1] // parts[part].shape[1], 1)
        for part in ("weight_scale", "weight_offset")
    )
    return (codes + offset) * scale


WEIGHTS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "W8A8_DYNAMIC": _channels,
    "W4A8_DYNAMIC": _bytes,
    "W4A16": _words,
}
