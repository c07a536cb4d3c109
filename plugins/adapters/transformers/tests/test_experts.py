# SPDX-License-Identifier: Apache-2.0
"""Stacked experts: found in either layout of a checkpoint, and named one by one for the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelslim.api import ExpertLinear, ModelError
from modelslim.checkpoint import Checkpoint
from modelslim.model_info import describe
from modelslim.testing.adapter import OpenModel
from modelslim_transformers.adapter import TransformersAdapter

pytestmark = pytest.mark.usefixtures("no_grad")

LAYER = "model.language_model.layers.1.mlp.experts"


def vision_language_moe(hidden: int, inner: int) -> Any:
    """A tiny Qwen3-VL-MoE."""
    from transformers import CONFIG_MAPPING, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": hidden, "intermediate_size": 24, "moe_intermediate_size": inner,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": hidden,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = CONFIG_MAPPING["qwen3_vl_moe"](text_config=text, vision_config=vision, image_token_id=3, video_token_id=4)
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def publish(model: Any, path: Path, turned: bool) -> dict[str, torch.Tensor]:
    """Store the model with its experts as [experts, in, out], as published, or as transformers holds them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if ".experts." in name]:
        state[name] = state[name].mT.contiguous() if turned else state[name]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    return state


@pytest.mark.parametrize("turned", [True, False], ids=["published", "as-in-memory"])
@pytest.mark.parametrize(
    ("hidden", "inner"), [(32, 24), (32, 32), (32, 16)], ids=["none-square", "square-down", "square-gate-up"]
)
def test_the_layout_is_known_from_the_checkpoint_also_where_one_weight_is_square(
    hidden: int, inner: int, turned: bool, tmp_path: Path
) -> None:
    model = vision_language_moe(hidden, inner)
    publish(model, tmp_path, turned)
    with Checkpoint(tmp_path) as checkpoint:
        found = OpenModel.of(TransformersAdapter("qwen3_vl_moe", tmp_path), checkpoint)
        assert found.loader.check() == []
        found.fill()
    for name, expected in model.state_dict().items():
        name = f"{name}.weight" if ".experts." in name else name
        assert torch.equal(found.model.get_parameter(name), expected), name
    inputs = torch.arange(5, 21).view(1, -1)
    assert torch.equal(found.model(input_ids=inputs).logits, model(input_ids=inputs).logits)


def test_experts_stored_as_one_tensor_are_named_one_by_one(tmp_path: Path) -> None:
    publish(vision_language_moe(32, 24), tmp_path, turned=True)
    with Checkpoint(tmp_path) as checkpoint:
        found = OpenModel.of(TransformersAdapter("qwen3_vl_moe", tmp_path), checkpoint)
        info = describe(found.model, found.visit, found.loader)
    linear = info.linears[f"{LAYER}.2.up_proj"]
    assert (linear.stored, linear.out_features, linear.in_features) == (f"{LAYER}.2.up_proj", 24, 32)
    assert found.loader.sources[f"{LAYER}.down_proj.weight"].keys == (f"{LAYER}.down_proj",)


def test_published_names_of_other_families_are_kept(stored: Callable[..., Path], common: Mapping[str, Any]) -> None:
    path = stored("mixtral", **{**common, "num_local_experts": 4})
    with Checkpoint(path) as checkpoint:
        found = OpenModel.of(TransformersAdapter("mixtral", path), checkpoint)
        linears = describe(found.model, found.visit, found.loader).linears
        files = checkpoint.tensors
    prefix = "model.layers.0.block_sparse_moe.experts.3"
    experts = "model.layers.0.mlp.experts.3"
    assert {linears[f"{experts}.{part}_proj"].stored for part in ("gate", "up", "down")} == {
        f"{prefix}.{part}" for part in ("w1", "w2", "w3")
    }
    assert linears[f"{experts}.gate_proj"].stored == f"{prefix}.w1"
    assert all(f"{linear.stored}.weight" in files for linear in linears.values())


def test_interleaved_rows_come_apart(stored: Callable[..., Path], common: Mapping[str, Any]) -> None:
    path = stored("gpt_oss", **{**common, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8})
    with Checkpoint(path) as checkpoint:
        found = OpenModel.of(TransformersAdapter("gpt_oss", path), checkpoint)
        found.fill()
    (tensors,) = (load_file(file) for file in path.glob("*.safetensors"))
    bank = found.model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert isinstance(bank, ExpertLinear) and bank.bias is not None
    stacked = tensors["model.layers.0.mlp.experts.gate_up_proj"]  # [experts, in, gate and up in turn]
    assert torch.equal(bank.weight[1, bank.parts["gate_proj"]], stacked[1, :, 0::2].t())
    assert torch.equal(bank.weight[1, bank.parts["up_proj"]], stacked[1, :, 1::2].t())
    assert torch.equal(bank.bias, tensors["model.layers.0.mlp.experts.gate_up_proj_bias"])


def test_an_expert_of_another_shape_is_refused(
    stored: Callable[..., Path], common: Mapping[str, Any], tmp_path: Path
) -> None:
    settings = {**common, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
    path = stored("qwen3_moe", **settings)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text())))
    with Checkpoint(tmp_path) as checkpoint:
        found = OpenModel.of(TransformersAdapter("qwen3_moe", tmp_path), checkpoint)
        with pytest.raises(ModelError, match=r"shape \[1, 32\]"):
            found.fill()
