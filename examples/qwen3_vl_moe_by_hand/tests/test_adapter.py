# SPDX-License-Identifier: Apache-2.0
"""The adapter keeps ModelSlim's contract, on a checkpoint as it is published and as transformers 5 saves it again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from modelslim_qwen3_vl_moe_by_hand.adapter import Qwen3VLMoeByHand
from modelslim_qwen3_vl_moe_by_hand.experts import expert_sources, fuse_experts
from torch import nn

from modelslim.api import InvalidDatasetError, VlmCalibSample
from modelslim.testing.adapter import AdapterContract

PUBLISHED = Path(__file__).parents[3] / "tests" / "models" / "qwen3-vl-moe-tiny"


@pytest.fixture(scope="module")
def saved_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, the experts now [experts, out, in]."""
    from transformers import AutoModelForImageTextToText

    path = tmp_path_factory.mktemp("again")
    AutoModelForImageTextToText.from_pretrained(PUBLISHED).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(PUBLISHED / name, path)
    return path


class TestQwen3VLMoeByHand(AdapterContract):
    @pytest.fixture(params=["published", "saved_again"])
    def checkpoint(self, request: pytest.FixtureRequest, saved_again: Path) -> Path:
        return PUBLISHED if request.param == "published" else saved_again

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        return Qwen3VLMoeByHand("qwen3_vl_moe", checkpoint)

    @pytest.fixture
    def samples(self, tmp_path: Path) -> Sequence[Any]:
        from PIL import Image

        samples = [VlmCalibSample("Text alone.")]
        for name, size in (("wide.png", (160, 96)), ("tall.jpg", (70, 130))):
            Image.linear_gradient("L").convert("RGB").resize(size).save(tmp_path / name)
            samples.append(VlmCalibSample("Describe the image.", str(tmp_path / name)))
        return samples

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        """The model as transformers itself loads it: nothing of the adapter takes part."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(checkpoint)(**inputs, use_cache=False).logits


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize(("hidden", "inner"), [(16, 16), (16, 8), (16, 24)])
def test_layout_of_the_experts_is_read_off_their_shapes(is_transposed: bool, hidden: int, inner: int) -> None:
    """One of the two weights may be square: alone it would not tell."""
    from transformers import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = Qwen3VLMoeTextConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=2)
    model = nn.ModuleDict({"experts": Qwen3VLMoeTextExperts(config)})
    fuse_experts(model)
    gate_up, down = torch.rand(2, 2 * inner, hidden), torch.rand(2, hidden, inner)
    wanted = {"gate_up_proj": gate_up, "down_proj": down}
    stored = {name: weight.transpose(1, 2) if is_transposed else weight for name, weight in wanted.items()}
    sources = expert_sources(model, {f"experts.{name}": tuple(weight.shape) for name, weight in stored.items()})
    for name, weight in wanted.items():
        source = sources[f"experts.{name}.weight"]
        assert source.keys == (f"experts.{name}",)
        made = source.convert([stored[name]]) if source.convert else stored[name]
        assert torch.equal(made, weight)


@pytest.mark.parametrize("sample", ["a bare string", VlmCalibSample("What moves?", video="ferry.mp4")])
def test_samples_of_another_kind_are_refused_with_their_number(sample: Any) -> None:
    samples = [VlmCalibSample("Text alone."), sample]
    with pytest.raises(InvalidDatasetError, match="calibration sample 2 is no text with or without an image"):
        Qwen3VLMoeByHand("qwen3_vl_moe", PUBLISHED).handle_dataset(samples, "cpu")
