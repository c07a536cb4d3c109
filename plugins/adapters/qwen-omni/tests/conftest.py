# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of whole models as their publisher stores them, and files of every kind that they take."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789Ġ"  # the last one is how byte-level tokenizers write a space
SPECIAL = {
    "image_token": "<image>",
    "audio_token": "<audio>",
    "video_token": "<video>",
    "vision_bos_token": "<vision>",
    "vision_eos_token": "</vision>",
    "audio_bos_token": "<sound>",
    "audio_eos_token": "</sound>",
}
"""Tokens behind the letters, from 40 on."""
IDS = dict(zip(SPECIAL, range(40, 47), strict=True))
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<vision><image></vision>{% elif part.type == 'audio' %}<sound><audio></sound>"
    "{% elif part.type == 'video' %}<vision><video></vision>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
)
TEXT: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
AUDIO: Mapping[str, Any] = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 64,
}
ARCHITECTURES = {"qwen2_5_omni": "Qwen2_5OmniModel", "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def thinker_config(model_type: str) -> dict[str, Any]:
    """Two layers of every kind; no two sizes are equal that a mistake could swap."""
    if model_type == "qwen2_5_omni":
        return {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {**VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            "audio_config": {**AUDIO, "n_window": 10},
            "image_token_index": IDS["image_token"],
            "audio_token_index": IDS["audio_token"],
            "video_token_index": IDS["video_token"],
            "audio_start_token_id": IDS["audio_bos_token"],
            "audio_end_token_id": IDS["audio_eos_token"],
            "vision_start_token_id": IDS["vision_bos_token"],
            "vision_end_token_id": IDS["vision_eos_token"],
        }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return {
        "text_config": {**TEXT, **experts, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "audio_config": {**AUDIO, "downsample_hidden_size": 4},
        "image_token_id": IDS["image_token"],
        "audio_token_id": IDS["audio_token"],
        "video_token_id": IDS["video_token"],
        "audio_start_token_id": IDS["audio_bos_token"],
        "audio_end_token_id": IDS["audio_eos_token"],
        "vision_start_token_id": IDS["vision_bos_token"],
        "vision_end_token_id": IDS["vision_eos_token"],
    }


def thinker_class(model_type: str) -> Any:
    import transformers

    name = "Qwen2_5Omni" if model_type.startswith("qwen2_5") else "Qwen3OmniMoe"
    return getattr(transformers, f"{name}ThinkerForConditionalGeneration")


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The thinker's tensors under the names of the publisher: an expert a tensor, all else as in memory."""
    tensors = {}
    for name, tensor in state.items():
        stored = "thinker." + name.replace("model.language_model.", "model.")
        stored = re.sub(r"^thinker\.model\.(visual|audio_tower)\.", r"thinker.\1.", stored)
        layer, is_expert, part = stored.partition(".mlp.experts.")
        if not is_expert:
            tensors[stored] = tensor.contiguous()
            continue
        for expert, weight in enumerate(tensor):
            rows = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            for linear, matrix in (rows if part == "gate_up_proj" else {"down_proj": weight}).items():
                tensors[f"{layer}.mlp.experts.{expert}.{linear}.weight"] = matrix.contiguous()
    return tensors


def others(model_type: str) -> dict[str, Tensor]:
    """Tensors beside the thinker, some under names that end like the thinker's."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "talker.model.embed_tokens.weight": random(16, 8).to(torch.bfloat16),
        "talker.model.layers.0.self_attn.q_proj.weight": random(8, 8).to(torch.bfloat16),
    }
    if model_type == "qwen2_5_omni":
        tensors["talker.thinker_to_talker_proj.weight"] = random(8, 32).to(torch.bfloat16)
        tensors["token2wav.code2wav_bigvgan_model.conv_pre.weight"] = random(8, 4, 7)
    else:
        for linear in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"talker.model.layers.0.mlp.experts.0.{linear}.weight"] = random(8, 8).to(torch.bfloat16)
        tensors["code2wav.pre_transformer.layers.0.mlp.up_proj.weight"] = random(12, 8).to(torch.bfloat16)
    return tensors


def write_checkpoint(path: Path, model_type: str) -> None:
    """A whole model: a thinker in which no norm or bias is 0 or 1, some tensors of the rest, all other files."""
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](thinker_config=thinker_config(model_type))
    config.dtype = "bfloat16"
    config.architectures = [ARCHITECTURES[model_type]]
    model = thinker_class(model_type)._from_config(config.thinker_config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        tensor += (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
    config.save_pretrained(path)
    parts = {"model-00001-of-00002": published(model.state_dict()), "model-00002-of-00002": others(model_type)}
    for name, tensors in parts.items():
        save_file(tensors, path / f"{name}.safetensors", metadata={"format": "pt"})
    weight_map = {key: f"{name}.safetensors" for name, tensors in parts.items() for key in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_processor(path)
    if model_type == "qwen2_5_omni":
        (path / "spk_dict.pt").write_bytes(b"a pickle that nobody opens")


def write_processor(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ("<pad>", "<s>", "</s>", *ALPHABET, *SPECIAL.values())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 64, "longest_edge": 512},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 8,
        "sampling_rate": 16000,
        "chunk_length": 1,
        "hop_length": 160,
        "n_fft": 400,
        "return_attention_mask": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a checkpoint; written once for equal arguments, so leave it alone."""
    written: dict[str, Path] = {}

    def find(model_type: str) -> Path:
        if model_type not in written:
            path = tmp_path_factory.mktemp(model_type)
            write_checkpoint(path, model_type)
            written[model_type] = path
        return written[model_type]

    return find


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a.png, b.jpg and, of different lengths and rates, a.wav and b.wav."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    generator = torch.Generator().manual_seed(2)
    for name, shape in (("a.png", (20, 24, 3)), ("b.jpg", (40, 16, 3))):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / name)
    for name, rate, seconds in (("a.wav", 16000, 0.31), ("b.wav", 44100, 0.5)):
        times = np.arange(int(rate * seconds)) / rate
        write_wav(folder / name, np.sin(2 * np.pi * 440 * times)[:, None], rate)
    return folder


def write_wav(path: Path, samples: Any, rate: int, width: int = 2) -> None:
    """A PCM file; samples are float64 [samples, channels], between -1 and 1."""
    codes = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    raw = codes.reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((raw + 128 if width == 1 else raw).astype(np.uint8).tobytes())


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As the engine has it."""
    with torch.no_grad():
        yield
