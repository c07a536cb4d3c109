# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose linears are float8 in blocks is read as the float model that it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelslim.api import ModelError
from modelslim.checkpoint import Checkpoint
from modelslim_transformers.adapter import TransformersAdapter

BLOCK = 16


@pytest.fixture
def float8(stored: Callable[..., Path], common: Mapping[str, Any], tmp_path: Path) -> Path:
    """A qwen3 with float8 linears, a scale for 16 times 16 weights, and everything else as it was."""
    shutil.copytree(stored("qwen3", head_dim=8, **common), tmp_path, dirs_exist_ok=True)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            padded = torch.nn.functional.pad(tensor.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
            blocks = padded.view(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
            tensors[name] = codes.contiguous().to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    file.write_text(json.dumps(config))
    return tmp_path


def test_weights_are_codes_times_scales(float8: Path) -> None:
    adapter = TransformersAdapter("qwen3", float8)
    raw = load_file(float8 / "model.safetensors")
    with Checkpoint(float8) as checkpoint:
        checkpoint.decode(adapter.get_decoded_tensors(checkpoint.stored))
        assert not [name for name in checkpoint.tensors if name.endswith("_scale_inv")]
        for name in checkpoint.tensors:
            weight = checkpoint.read(name)
            assert weight.dtype == torch.bfloat16
            if name.endswith("_proj.weight"):
                scale = raw[f"{name}_scale_inv"].double()
                rows, columns = weight.shape
                spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
                expected = (raw[name].to(torch.float64) * spread).to(torch.float32).to(torch.bfloat16)
                assert torch.equal(weight, expected)
            else:
                assert torch.equal(weight, raw[name])


def test_model_is_built_as_a_float_one(float8: Path) -> None:
    model = TransformersAdapter("qwen3", float8).init_model("meta")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is torch.nn.Linear


def test_weight_without_its_scales_is_named(float8: Path) -> None:
    file = float8 / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, file, {"format": "pt"})
    with Checkpoint(float8) as checkpoint, pytest.raises(ModelError, match=r"there is no .*up_proj.weight_scale_inv"):
        TransformersAdapter("qwen3", float8).get_decoded_tensors(checkpoint.stored)
