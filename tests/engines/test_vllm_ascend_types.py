# SPDX-License-Identifier: Apache-2.0
"""Every ascendv1 type that vllm-ascend registers: its scheme class makes parameters that vLLM's loader fills with ours.

The parameters are compared before the engine repacks them for its kernels, since most of those have no stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INT8, TOKEN, QConfig, Quantize, Read, TinyFactory
from safetensors.torch import load_file
from torch import Tensor

from modelslim.api import FUSED
from modelslim.errors import ModelSlimError
from modelslim.plan import make_plan
from modelslim_ascendv1.in_vllm_ascend import NOT_LOADED

INT4 = {**INT8, "dtype": "int4"}
FP8: QConfig = {
    "act": {"scope": "per_token", "dtype": "fp8_e4m3", "symmetric": True, "method": "minmax"},
    "weight": {"scope": "per_channel", "dtype": "fp8_e4m3", "symmetric": True, "method": "minmax"},
}


def blocks(dtype: str) -> QConfig:
    return {"scope": "per_block", "dtype": dtype, "symmetric": True, "method": "minmax"}


MXFP8: QConfig = {"act": blocks("mxfp8"), "weight": blocks("mxfp8")}
MXFP4: QConfig = {"act": blocks("mxfp4"), "weight": blocks("mxfp4")}
MXFP4_8: QConfig = {"act": blocks("mxfp8"), "weight": blocks("mxfp4")}
STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}

LINEARS: Mapping[str, QConfig] = {
    "W8A8_DYNAMIC": {"act": TOKEN, "weight": INT8},
    "W8A8": {"act": STATIC, "weight": INT8},
    "W8A8_MIX": {"act": {**STATIC, "scope": "pd_mix"}, "weight": INT8},
    "W8A16": {"weight": INT8},
    "W4A4_DYNAMIC": {"act": {**TOKEN, "dtype": "int4"}, "weight": INT4},
    "W8A8FP8_DYNAMIC": FP8,
    "W8A8_MXFP8": MXFP8,
    "W4A8_MXFP": MXFP4_8,
    "W4A4_MXFP4": MXFP4,
}
EXPERTS: Mapping[str, tuple[QConfig, QConfig]] = {
    "W8A8_DYNAMIC": (LINEARS["W8A8_DYNAMIC"], LINEARS["W8A8_DYNAMIC"]),
    "W4A8_DYNAMIC": (LINEARS["W8A8_DYNAMIC"], {"act": TOKEN, "weight": INT4}),
    "W4A16": (
        LINEARS["W8A8_DYNAMIC"],
        {"weight": {**INT4, "scope": "per_group", "group_size": 32, "symmetric": False}},
    ),
    "W8A8FP8_DYNAMIC": (FP8, FP8),
    "W8A8_MXFP8": (MXFP8, MXFP8),
    "W4A8_MXFP": (MXFP8, MXFP4_8),
    "W4A4_MXFP4": (MXFP8, MXFP4),
    "W4A16_MXFP4": (MXFP8, {"weight": blocks("mxfp4")}),
}
"""What the linears outside and inside the experts become."""

REFUSED: Mapping[str, tuple[QConfig, QConfig | None]] = {
    "W4A8_DYNAMIC": (EXPERTS["W4A8_DYNAMIC"][1], None),
    "W4A16": ({"weight": {**INT4, "scope": "per_group", "group_size": 32}}, None),
    "W4A16_MXFP4": ({"weight": blocks("mxfp4")}, None),
    "W8A16 experts": (LINEARS["W8A8_DYNAMIC"], LINEARS["W8A16"]),
    "W4A4_DYNAMIC experts": (LINEARS["W8A8_DYNAMIC"], LINEARS["W4A4_DYNAMIC"]),
}
"""What the format has and this engine has not, in linears outside experts or inside."""

STACKS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
LAYER = "model.layers.1"
OF_A_TENSOR = ("input_scale", "input_offset")


@pytest.fixture(scope="module")
def linears(tiny_qwen2: TinyFactory, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the loader made of every type outside experts."""
    places = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    jobs = {
        type_: {
            "model": quantize(tiny_qwen2("bfloat16"), "ascendv1_saver", qconfig),
            "dtype": "bfloat16",
            "stored": True,
            "kept": [f"{LAYER}.{place}" for place in places],
        }
        for type_, qconfig in LINEARS.items()
    }
    return read_with_vllm(jobs, ascend=True)


@pytest.fixture(scope="module")
def experts(tiny_qwen3_moe: Path, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the loader made of every type inside experts."""
    jobs = {
        type_: {
            "model": quantize(tiny_qwen3_moe, "ascendv1_saver", outside, experts=inside),
            "dtype": "bfloat16",
            "stored": True,
            "kept": [f"{LAYER}.mlp.experts.routed_experts"],
        }
        for type_, (outside, inside) in EXPERTS.items()
    }
    return read_with_vllm(jobs, ascend=True)


@pytest.fixture(scope="module")
def refused(tiny_qwen3_moe: Path, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the engine says to each of the others."""
    jobs = {}
    for name, (outside, inside) in REFUSED.items():
        model = quantize(tiny_qwen3_moe, "ascendv1_saver", outside, experts=inside or LINEARS["W8A8_DYNAMIC"])
        jobs[name] = {"model": model, "dtype": "bfloat16", "stored": True}
    return read_with_vllm(jobs, ascend=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_for_the_engine_refuses_does_not_load(
    name: str, refused: Mapping[str, Any], tiny_qwen3_moe: Path
) -> None:
    assert refused[name].get("error")
    protocol = Path(refused[name]["model"]).with_name("protocol.yaml")
    with pytest.raises(ModelSlimError, match="vLLM-Ascend"):
        make_plan(tiny_qwen3_moe, protocol, device="cpu", engine="vllm-ascend-0.23")


@pytest.mark.parametrize("type_", LINEARS)
def test_the_parameters_of_linears_hold_what_we_wrote(type_: str, linears: Mapping[str, Any]) -> None:
    result = linears[type_]
    assert "error" not in result, result["error"]
    ours, held = read_all(Path(result["model"])), load_file(result["tensors"])
    assert held
    for name, parameter in held.items():
        linear, _, part = name.rpartition(".")
        assert result["kernels"][linear].startswith("Ascend")
        parent, _, last = linear.rpartition(".")
        stored = [f"{parent}.{one}.{part}" for one in FUSED.get(last, (last,))]
        if part not in NOT_LOADED.get(type_, ()):
            same(parameter, ours[stored[-1]] if part in OF_A_TENSOR else torch.cat([ours[one] for one in stored]))


@pytest.mark.parametrize("type_", EXPERTS)
def test_the_parameters_of_experts_hold_what_we_wrote(type_: str, experts: Mapping[str, Any]) -> None:
    result = experts[type_]
    assert "error" not in result, result["error"]
    ours, held = read_all(Path(result["model"])), load_file(result["tensors"])
    assert held
    for name, parameter in held.items():
        layer, _, last = name.rpartition(".")
        assert result["kernels"][layer].startswith("Ascend")
        stack, _, part = last.partition("_")
        for expert, one in enumerate(parameter):
            parts = [f"{LAYER}.mlp.experts.{expert}.{linear}.{part}" for linear in STACKS[stack]]
            same(one, ours[parts[-1]] if part == "weight_shape" else torch.cat([ours[stored] for stored in parts]))


def read_all(directory: Path) -> Mapping[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def same(parameter: Tensor, ours: Tensor) -> None:
    """The loader, which copies into any dtype without a word, lost nothing."""
    assert parameter.shape == ours.shape
    # Only the offset of inputs is an integer in the engine and a float, holding an integer, on disk.
    assert parameter.dtype.is_floating_point == ours.dtype.is_floating_point or parameter.dtype == torch.int8
    assert torch.equal(parameter.double(), ours.double())
