# SPDX-License-Identifier: Apache-2.0
"""The family on a trained tiny Qwen3-VL-MoE and on random models of its other classes, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelslim.api import VlmCalibSample
from modelslim.model_info import describe
from modelslim.registry import Registry
from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim_qwen3_vl.adapter import Qwen3VLAdapter

TRAINED = Path(__file__).parents[4] / "tests" / "models" / "qwen3-vl-moe-tiny"
"""Publishes its experts as [experts, in, out], like the real ones; its tokenizer and processor serve all classes."""
TEXT: Mapping[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 64,
}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 16},
        "vision_config": {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
    },
    "qwen2_5_vl": {
        "text_config": TEXT,
        "vision_config": {**TOWER, "window_size": 64, "fullatt_block_indexes": [1]},
    },
}
MARKS = {"image_token_id": 2043, "video_token_id": 2044, "vision_start_token_id": 2040, "vision_end_token_id": 2041}


@lru_cache(maxsize=1)
def reference(checkpoint: Path) -> nn.Module:
    """The model as transformers itself loads it."""
    from transformers import AutoModelForMultimodalLM

    model: nn.Module = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Drawn scenes; the second is tall, so that its grid differs."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, size in (("a.png", (96, 96)), ("b.jpg", (70, 130))):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((10, 20, 60, 70), fill="red", outline="blue")
        image.save(folder / name)
        paths.append(str(folder / name))
    return paths


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a checkpoint by model_type; written once."""
    written = {"qwen3_vl_moe": TRAINED}

    def find(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = _write(model_type, tmp_path_factory.mktemp(model_type))
        return written[model_type]

    return find


def _write(model_type: str, path: Path) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**RANDOM[model_type], **MARKS)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor += torch.randn(tensor.shape).to(tensor.dtype) * 0.1  # norms and biases are not 1 and 0
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(TRAINED / name, path)
    return path


class TestQwen3VLAdapter(AdapterContract):
    @pytest.fixture(params=["qwen3_vl_moe", *RANDOM])
    def model_type(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def checkpoint(self, model_type: str, checkpoints: Callable[[str], Path]) -> Path:
        return checkpoints(model_type)

    @pytest.fixture
    def adapter(self, model_type: str, checkpoint: Path) -> object:
        return Qwen3VLAdapter(model_type, checkpoint)

    @pytest.fixture
    def samples(self, pictures: Sequence[str]) -> Sequence[Any]:
        chat = [{"role": "user", "content": "Who are you?"}]
        return ["Plain text.", *(VlmCalibSample("Describe the image.", picture) for picture in pictures), chat]

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return reference(checkpoint)(**inputs, use_cache=False).logits

    def test_units_are_the_tower_and_the_decoder_layers(self, opened: OpenModel) -> None:
        layers = [f"model.language_model.layers.{index}" for index in range(len(opened.visit) - 1)]
        assert [request.name for request in opened.visit] == ["model.visual", *layers]
        assert len(layers) == len(opened.model.model.language_model.layers)  # type: ignore[union-attr, arg-type]

    def test_no_linear_but_the_head_lies_outside_the_units(self, opened: OpenModel) -> None:
        info = describe(opened.model, opened.visit, opened.loader)
        assert [linear.name for linear in info.by_unit[""]] == ["lm_head"]
        tower = {linear.name for linear in info.by_unit["model.visual"]}
        assert any("merger" in name for name in tower)

    def test_every_stored_tensor_makes_some_parameter(self, opened: OpenModel) -> None:
        named = {key for source in opened.loader.sources.values() for key in source.keys}
        assert named == opened.checkpoint.tensors.keys()


def test_placeholders_are_as_many_as_merged_patches(pictures: Sequence[str]) -> None:
    samples = [VlmCalibSample("Describe the image.", picture) for picture in pictures]
    inputs = Qwen3VLAdapter("qwen3_vl_moe", TRAINED).handle_dataset(samples, "cpu")
    assert [sample["image_grid_thw"].tolist() for sample in inputs] == [[[1, 6, 6]], [[1, 8, 4]]]
    for sample, merged in zip(inputs, (9, 8), strict=True):
        assert int((sample["input_ids"] == MARKS["image_token_id"]).sum()) == merged
        assert torch.equal(sample["mm_token_type_ids"], (sample["input_ids"] == MARKS["image_token_id"]).long())
        assert len(sample["pixel_values"]) == merged * 4


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_model_type_finds_the_adapter(model_type: str) -> None:
    assert Registry.scan().load("adapters", model_type) is Qwen3VLAdapter


@pytest.mark.parametrize(
    "name", ["Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B", "Qwen3-VL-8B-Instruct", "Qwen2.5-VL-7B-Instruct"]
)
def test_published_name_finds_the_adapter(name: str) -> None:
    assert Registry.scan().load("models", name) is Qwen3VLAdapter
