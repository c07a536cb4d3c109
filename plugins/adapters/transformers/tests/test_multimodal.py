# SPDX-License-Identifier: Apache-2.0
"""What images become, which names a multimodal checkpoint may have, and what is said when files cannot be used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.api import CapabilityError, DatasetError, InvalidDatasetError, ModelError, VlmCalibSample
from modelslim.checkpoint import Checkpoint
from modelslim.model_info import describe
from modelslim.testing.adapter import OpenModel
from modelslim_transformers.adapter import TransformersAdapter

pytestmark = pytest.mark.usefixtures("no_grad")

IMAGE, VIDEO, BEGIN, END = 40, 41, 42, 43
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN: Mapping[str, Any] = {
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
    },
    **MARKS,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
Build = Callable[[str], Path]


@pytest.fixture
def build(stored: Callable[..., Path], common: Mapping[str, Any], tmp_path: Path) -> Build:
    """A checkpoint of its own that a test may change."""

    def make(model_type: str) -> Path:
        settings: Mapping[str, Any] = {**QWEN, "text_config": {**common, "rope_parameters": ROTARY}}
        if model_type == "qwen3_vl":
            deepstack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            settings = {**settings, "vision_config": {**settings["vision_config"], **deepstack}}
            settings["text_config"]["head_dim"] = 8
        if model_type == "internvl":
            settings = {"text_config": {**common, "model_type": "qwen2"}, "vision_config": VISION}
            settings["image_token_id"] = IMAGE
        if model_type == "llava":
            settings = {"text_config": {**common, "model_type": "llama"}, "vision_config": CLIP}
            settings["image_token_index"] = IMAGE
        shutil.copytree(stored(model_type, **settings), tmp_path, dirs_exist_ok=True)
        return tmp_path

    return make


def inputs_of(path: Path, samples: Sequence[Any]) -> list[dict[str, Any]]:
    return TransformersAdapter("any", path).handle_dataset(samples, "cpu")


def letters(text: str) -> list[int]:
    """Ids of a text of the test tokenizer."""
    return [3 + "abcdefghijklmnopqrstuvwxyz0123456789 ".index(letter) for letter in text]


def patches(image: Path, size: int, merge: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Patches of a picture as Qwen-VL wants them, by a loop: those that are merged follow one another."""
    import numpy as np
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(Image.open(image).convert("RGB")).copy()).double().permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    _, height, width = pixels.shape
    step, rows = size * merge, []
    for top in range(0, height, step):
        for left in range(0, width, step):
            for y in range(top, top + step, size):
                for x in range(left, left + step, size):
                    patch = pixels[:, y : y + size, x : x + size]
                    rows.append(torch.stack([patch, patch], 1).flatten())  # a picture is a film of two equal frames
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_picture_of_qwen_becomes_patches_in_merged_order(model_type: str, build: Build, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "whole.png"  # sides are multiples of patch times merge, so that it is not resized
    pixels = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).save(picture)
    path = build(model_type)
    (sample,) = inputs_of(path, [VlmCalibSample("what", str(picture))])
    assert sample["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert sample["pixel_values"].dtype == torch.bfloat16
    clip = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(sample["pixel_values"].double(), patches(picture, 4, 2, *clip), rtol=2**-8, atol=2**-8)
    seen = [*letters("user "), BEGIN, *[IMAGE] * 6, END, *letters("what")]
    assert sample["input_ids"].tolist() == [seen]
    assert sample["mm_token_type_ids"].tolist() == [[int(token == IMAGE) for token in seen]]
    assert sample["attention_mask"].tolist() == [[1] * len(seen)]


def test_picture_of_llava_becomes_one_square_and_its_tokens(build: Build, pictures: Sequence[Path]) -> None:
    (sample,) = inputs_of(build("llava"), [VlmCalibSample("what", str(pictures[0]))])
    assert sample["pixel_values"].shape == (1, 3, 16, 16)
    assert sample["input_ids"].tolist() == [[*letters("user "), *[IMAGE] * 16, *letters("what")]]


def test_picture_of_internvl_becomes_tiles_and_their_tokens(build: Build, pictures: Sequence[Path]) -> None:
    (sample,) = inputs_of(build("internvl"), [VlmCalibSample("what", str(pictures[1]))])
    tiles = len(sample["pixel_values"])
    assert (tiles, sample["pixel_values"].shape[1:]) == (3, (3, 16, 16))  # two halves of a tall picture and the whole
    assert sample["input_ids"].tolist() == [[*letters("user "), BEGIN, *[IMAGE] * 4 * tiles, END, *letters("what")]]


def test_picture_changes_the_answer(build: Build, pictures: Sequence[Path]) -> None:
    path = build("qwen3_vl")
    with Checkpoint(path) as checkpoint:
        model = OpenModel.of(TransformersAdapter("qwen3_vl", path), checkpoint)
        samples = inputs_of(path, [VlmCalibSample("what", str(pictures[0]))] * 2)
        samples[1]["pixel_values"] = -samples[1]["pixel_values"]
        outputs = model.run_units(samples)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_image_and_video_of_one_sample_pass_the_tower_one_after_the_other(build: Build) -> None:
    """Inputs made by hand, since a video needs packages for decoding; against the loader of transformers."""
    from transformers import AutoModelForMultimodalLM

    path = build("qwen3_vl")
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([[5, BEGIN, *[IMAGE] * 4, END, 6, BEGIN, *[VIDEO] * 2, END, BEGIN, *[VIDEO] * 2, END, 7]])
    sample = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        "pixel_values": torch.randn(16, 96, generator=generator, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(16, 96, generator=generator, dtype=torch.bfloat16),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with Checkpoint(path) as checkpoint:
        outputs = OpenModel.of(TransformersAdapter("qwen3_vl", path), checkpoint).run_units([sample, text, sample])
    whole: Any = AutoModelForMultimodalLM.from_pretrained(path)
    for output, inputs in zip(outputs, [sample, text, sample], strict=True):
        assert torch.equal(output, whole(**inputs, use_cache=False).logits)


NAMES: Mapping[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "qwen2_5_vl, first layout": (
        "qwen2_5_vl",
        {},
        {"model.visual.blocks.0.attn.qkv": "visual.blocks.0.attn.qkv"}
        | {"model.language_model.layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj", "lm_head": "lm_head"},
    ),
    "qwen2_5_vl, names of today": (
        "qwen2_5_vl",
        {r"^visual": "model.visual", r"^model\.(layers|embed_tokens|norm)": r"model.language_model.\1"},
        {"model.visual.blocks.0.attn.qkv": "model.visual.blocks.0.attn.qkv"}
        | {"model.language_model.layers.1.mlp.up_proj": "model.language_model.layers.1.mlp.up_proj"},
    ),
    "internvl": (
        "internvl",
        {},
        {"model.vision_tower.encoder.layer.1.mlp.fc2": "vision_tower.encoder.layer.1.mlp.fc2"}
        | {"model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1"}
        | {"model.language_model.layers.0.mlp.up_proj": "language_model.model.layers.0.mlp.up_proj"},
    ),
    "llava": (
        "llava",
        {r"^vision_tower\.": "vision_tower.vision_model."},
        {"model.vision_tower.encoder.layers.0.mlp.fc1": "vision_tower.vision_model.encoder.layers.0.mlp.fc1"}
        | {"model.multi_modal_projector.linear_2": "multi_modal_projector.linear_2"}
        | {"model.language_model.layers.0.mlp.up_proj": "language_model.model.layers.0.mlp.up_proj"}
        | {"lm_head": "language_model.lm_head"},
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_linears_keep_the_names_under_which_they_were_published(case: str, build: Build) -> None:
    from transformers import AutoModelForMultimodalLM

    model_type, renames, expected = NAMES[case]
    path = build(model_type)
    tensors = load_file(path / "model.safetensors")
    for pattern, new in renames.items():
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(path) as checkpoint:
        model = OpenModel.of(TransformersAdapter(model_type, path), checkpoint)
        linears = describe(model.model, model.visit, model.loader).linears
        assert {name: linears[name].stored for name in expected} == expected
        named = {key for source in model.loader.sources.values() for key in source.keys}
        assert named == checkpoint.tensors.keys()
        model.fill()
    for name, tensor in AutoModelForMultimodalLM.from_pretrained(path).state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


def test_connector_lies_outside_the_units(build: Build) -> None:
    """A model may call tower, connector, tower, connector, which no order of units allows."""
    path = build("llava")
    with Checkpoint(path) as checkpoint:
        model = OpenModel.of(TransformersAdapter("llava", path), checkpoint)
        outside = describe(model.model, model.visit, model.loader).by_unit[""]
    names = {linear.name for linear in outside}
    assert names == {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "lm_head"}


def test_chat_of_a_multimodal_model_is_written_with_the_template_of_its_processor(build: Build) -> None:
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    (sample,) = inputs_of(build("llava"), [chat])
    assert sample["input_ids"].tolist() == [letters("user abassistant c")]


def test_sample_without_files_is_a_chat(build: Build) -> None:
    (sample,) = inputs_of(build("qwen3_vl"), [VlmCalibSample("ab")])
    assert sample["input_ids"].tolist() == [letters("user ab")]


def test_sample_without_files_is_a_chat_for_a_text_model(llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}")
    (sample,) = inputs_of(llama, [VlmCalibSample("ab")])
    assert sample["input_ids"].tolist() == [letters("user ab")]


def test_text_model_is_not_shown_pictures(llama: Path, pictures: Sequence[Path]) -> None:
    with pytest.raises(InvalidDatasetError, match=r"sample 2 holds .*a\.png, and the model takes no image") as caught:
        inputs_of(llama, ["ab", VlmCalibSample("ab", str(pictures[0]))])
    assert caught.value.hint == "leave out the samples with image"


def test_vision_model_is_not_played_sound(build: Build, pictures: Sequence[Path]) -> None:
    samples = [VlmCalibSample("ab", str(pictures[0])), VlmCalibSample("ab", audio="/data/a.wav")]
    with pytest.raises(InvalidDatasetError, match=r"sample 2 holds /data/a\.wav, and the model takes no audio"):
        inputs_of(build("qwen3_vl"), samples)


def test_video_without_torchvision_is_refused_before_a_sample_is_read(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    samples = [VlmCalibSample("ab", "/no/such/picture.png"), VlmCalibSample("ab", video="/data/a.mp4")]
    with pytest.raises(
        CapabilityError, match=r"sample 2 holds /data/a\.mp4, and transformers needs torchvision"
    ) as caught:
        inputs_of(build("qwen3_vl"), samples)
    assert "install the torchvision that fits torch" in caught.value.hint


def test_broken_picture_is_named_by_its_sample(build: Build, tmp_path: Path, pictures: Sequence[Path]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    with pytest.raises(DatasetError, match="calibration sample 2: the model's processor refuses it"):
        inputs_of(build("llava"), [VlmCalibSample("ab", str(pictures[0])), VlmCalibSample("ab", str(broken))])


def test_processor_without_a_chat_template_is_refused(build: Build, pictures: Sequence[Path]) -> None:
    path = build("llava")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(DatasetError, match="the processor has no chat template") as caught:
        inputs_of(path, [VlmCalibSample("ab", str(pictures[0]))])
    assert "chat_template.jinja" in caught.value.hint


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava"])
def test_missing_processor_is_refused(model_type: str, build: Build, pictures: Sequence[Path]) -> None:
    path = build(model_type)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (path / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="processor") as caught:
        inputs_of(path, [VlmCalibSample("ab", str(pictures[0]))])
    assert "preprocessor_config.json" in caught.value.hint
    assert inputs_of(path, ["ab"])[0]["input_ids"].tolist() == [letters("ab")]


def test_package_that_reads_a_file_is_named_when_it_is_missing(
    build: Build, pictures: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaProcessor

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("load_picture requires the picturelib library")

    monkeypatch.setattr(LlavaProcessor, "apply_chat_template", refuse)
    with pytest.raises(CapabilityError, match=r"sample 1: transformers lacks a package: .*picturelib"):
        inputs_of(build("llava"), [VlmCalibSample("ab", str(pictures[0]))])


@pytest.mark.parametrize(
    ("architecture", "sees"), [("Qwen3_5ForConditionalGeneration", True), ("Qwen3_5ForCausalLM", False)]
)
def test_published_class_decides_where_a_configuration_describes_two(
    architecture: str, sees: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "architectures": [architecture]}))
    assert TransformersAdapter("qwen3_5", tmp_path).is_multimodal is sees
