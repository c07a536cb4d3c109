# SPDX-License-Identifier: Apache-2.0
"""The thinker inside tiny checkpoints of whole models, against the thinker that transformers loads from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modelslim.api import CapabilityError, ModelError, VlmCalibSample
from modelslim.checkpoint import Checkpoint
from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim_qwen_omni.adapter import QwenOmniAdapter

MODELS = ("qwen2_5_omni", "qwen3_omni_moe")
VIDEO, VISION_BEGIN, VISION_END = 42, 43, 44
Stored = Callable[[str], Path]


@lru_cache(maxsize=2)
def reference(path: Path, model_type: str) -> Any:
    """The thinker as transformers itself loads it from the whole checkpoint."""
    import transformers

    name = "Qwen2_5Omni" if model_type == "qwen2_5_omni" else "Qwen3OmniMoe"
    return getattr(transformers, f"{name}ThinkerForConditionalGeneration").from_pretrained(path)


@pytest.fixture(params=MODELS)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestQwenOmni(AdapterContract):
    @pytest.fixture
    def checkpoint(self, model_type: str, stored: Stored) -> Path:
        return stored(model_type)

    @pytest.fixture
    def adapter(self, model_type: str, checkpoint: Path) -> object:
        return QwenOmniAdapter(model_type, checkpoint)

    @pytest.fixture
    def samples(self, media: Path) -> Sequence[Any]:
        return (
            VlmCalibSample("what is it", image=str(media / "a.png"), audio=str(media / "a.wav")),
            VlmCalibSample("and this one", image=str(media / "b.jpg")),
            VlmCalibSample("what do you hear", audio=str(media / "b.wav")),
            VlmCalibSample("text alone"),
            [{"role": "user", "content": "a chat"}],
            "seven words without any chat template here",
        )

    @pytest.fixture(autouse=True)
    def find_reference(self, checkpoint: Path, model_type: str) -> None:
        self.reference = reference(checkpoint, model_type)

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return self.reference(**inputs, use_cache=False).logits

    def test_parameters_and_buffers_are_those_of_from_pretrained(self, opened: OpenModel) -> None:
        opened.fill()
        state = opened.model.state_dict() | dict(opened.model.named_buffers())
        expected = self.reference.state_dict() | dict(self.reference.named_buffers())
        # Fused experts are modules here and parameters there.
        actual = {name if name in expected else name.removesuffix(".weight"): name for name in state}
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (name, state[actual[name]].dtype) == (name, tensor.dtype)
            assert torch.equal(state[actual[name]], tensor), name

    def test_units_are_audio_vision_and_the_layers(self, opened: OpenModel) -> None:
        assert [request.name for request in opened.visit] == [
            "model.audio_tower",
            "model.visual",
            "model.language_model.layers.0",
            "model.language_model.layers.1",
        ]

    def test_only_the_thinkers_tensors_make_parameters_and_all_of_them_do(self, opened: OpenModel) -> None:
        used = {key for source in opened.loader.sources.values() for key in source.keys}
        assert used == {name for name in opened.checkpoint.tensors if name.startswith("thinker.")}
        assert len(used) < len(opened.checkpoint.tensors)

    def test_video_beside_image_and_audio_is_the_same_unit_by_unit(
        self, adapter: Any, opened: OpenModel, media: Path, checkpoint: Path
    ) -> None:
        sample = VlmCalibSample("see", image=str(media / "a.png"), audio=str(media / "a.wav"))
        inputs = [frames(2), frames(3), {**adapter.handle_dataset([sample], "cpu")[0]}]
        for key, value in frames(2).items():
            both = key in ("input_ids", "attention_mask")
            inputs[2][key] = torch.cat((inputs[2][key], value), dim=1) if both else value
        outputs = opened.run_units(inputs)
        for output, arguments in zip(outputs, inputs, strict=True):
            assert torch.equal(output, self.whole_forward(opened.model, arguments, checkpoint))


def frames(grids: int) -> dict[str, torch.Tensor]:
    """What the processor gives for a video of 2 * grids frames of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(grids)
    tokens = [VISION_BEGIN, *[VIDEO] * (grids * 4), VISION_END, 5, 6, 7]
    return {
        "input_ids": torch.tensor([tokens]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
        "pixel_values_videos": torch.randn(grids * 16, 96, generator=generator).to(torch.bfloat16),
        "video_grid_thw": torch.tensor([[grids, 4, 4]]),
        "video_second_per_grid": torch.tensor([1.0]),
    }


def test_features_reach_the_logits(model_type: str, stored: Stored, media: Path) -> None:
    """Else the comparison of forwards would prove nothing about the towers."""
    adapter = QwenOmniAdapter(model_type, stored(model_type))
    for fields in ({"image": "a.png"}, {"audio": "a.wav"}):
        sample = VlmCalibSample("see", **{key: str(media / name) for key, name in fields.items()})
        inputs = adapter.handle_dataset([sample], "cpu")[0]
        feature = "pixel_values" if "image" in fields else "input_features"
        with torch.no_grad():
            outputs = [
                reference(stored(model_type), model_type)(**{**inputs, feature: inputs[feature] * factor}).logits
                for factor in (1.0, -1.0)
            ]
        assert not torch.equal(*outputs)


def test_audio_becomes_as_many_tokens_as_it_lasts(stored: Stored, media: Path) -> None:
    """0.31 s are 31 frames of features; two strides of two, the second between pairs, leave 8 tokens."""
    adapter = QwenOmniAdapter("qwen2_5_omni", stored("qwen2_5_omni"))
    inputs = adapter.handle_dataset([VlmCalibSample("x", audio=str(media / "a.wav"))], "cpu")[0]
    assert inputs["feature_attention_mask"].sum() == 31
    assert (inputs["input_ids"] == 41).sum() == 8


def test_frames_have_the_rate_that_the_processor_takes_them_to_have(
    model_type: str, stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    seconds = 4
    taken: list[float] = []

    def read(path: str, rate: float) -> Any:
        taken.append(rate)
        return np.zeros((int(seconds * rate), 16, 16, 3), np.uint8)

    monkeypatch.setattr("modelslim_qwen_omni.adapter.read_frames", read)
    adapter = QwenOmniAdapter(model_type, stored(model_type))
    (inputs,) = adapter.handle_dataset([VlmCalibSample("see", video="a.mp4")], "cpu")
    times, height, width = inputs["video_grid_thw"][0].tolist()
    assert times * inputs["video_second_per_grid"].item() == seconds
    assert times == seconds * taken[0] / 2
    assert (inputs["input_ids"] == VIDEO).sum() == times * height * width / 4
    with torch.no_grad():
        assert reference(stored(model_type), model_type)(**inputs).logits.isfinite().all()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_video_without_torchvision_is_refused_and_all_else_works(model_type: str, stored: Stored) -> None:
    adapter = QwenOmniAdapter(model_type, stored(model_type))
    with pytest.raises(CapabilityError, match="needs torchvision for video") as caught:
        adapter.handle_dataset([VlmCalibSample("x", video="/nowhere/a.mp4")], "cpu")
    assert "install the torchvision" in caught.value.hint


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def copied(model_type: str, stored: Stored, tmp_path: Path) -> Path:
    """A checkpoint of its own that a test may change."""
    shutil.copytree(stored(model_type), tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_dtype_is_the_thinkers_own_then_that_of_the_whole_model(model_type: str, copied: Path) -> None:
    def state(whole: str, own: str | None) -> Callable[[dict[str, Any]], None]:
        def change(config: dict[str, Any]) -> None:
            config["dtype"] = whole
            config["thinker_config"]["dtype"] = own

        return change

    edit(copied, state("float16", None))
    assert QwenOmniAdapter(model_type, copied).dtype == torch.float16
    edit(copied, state("float16", "float32"))
    assert QwenOmniAdapter(model_type, copied).dtype == torch.float32


def test_quantized_checkpoint_is_refused(model_type: str, copied: Path) -> None:
    edit(copied, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ModelError, match=r"quantized already .*gptq"):
        QwenOmniAdapter(model_type, copied).init_model("meta")


def test_nobody_is_warned_of_the_talker(stored: Stored, caplog: pytest.LogCaptureFixture) -> None:
    """Published talkers have token ids beyond their vocabulary, at which transformers wonders once a process."""
    from transformers import AutoConfig
    from transformers.utils import logging

    def warnings_of(read: Callable[[], Any]) -> list[str]:
        caplog.clear()
        logging.warning_once.cache_clear()
        read()
        return [record.message for record in caplog.records]

    path = stored("qwen2_5_omni")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        assert "tts_text_start_token_id" in warnings_of(lambda: AutoConfig.from_pretrained(path))[0]
        assert warnings_of(lambda: QwenOmniAdapter("qwen2_5_omni", path).config) == []
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(verbosity)
        logging.disable_propagation()


def test_checkpoint_of_the_thinker_alone_is_served(model_type: str, stored: Stored, tmp_path: Path) -> None:
    model = reference(stored(model_type), model_type)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    adapter = QwenOmniAdapter(config["model_type"], tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        opened = OpenModel.of(adapter, checkpoint)
        opened.fill()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        assert torch.equal(opened.model(**inputs).logits, model(**inputs).logits)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("talker")]
