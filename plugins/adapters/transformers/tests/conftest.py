# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of many architectures, as save_pretrained writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789Ġ"  # the last one is how byte-level tokenizers write a space
COMMON: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Two layers. Experts and linears have another size than the model, so that a wrong transposition shows."""
PLACEHOLDERS: Mapping[str, str] = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<begin>",
    "vision_end_token": "<end>",
}
"""Tokens that stand for pictures, behind the letters from 40 on; families know them by several names."""
ALIASES: Mapping[str, str] = {
    "context_image_token": "<image>",
    "start_image_token": "<begin>",
    "end_image_token": "<end>",
    "boi_token": "<begin>",
    "eoi_token": "<end>",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}PICTURE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
PICTURES: Mapping[str, str] = {"llava": "<image>", "internvl": "<image>", "gemma3": "<begin>"}
"""What a chat template writes for a picture; the other families put the token between begin and end."""
SQUARE = {"height": 16, "width": 16}
PREPROCESSOR: Mapping[str, Mapping[str, Any]] = {
    "qwen": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 64, "longest_edge": 512},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "llava": {"image_processor_type": "CLIPImageProcessor", "crop_size": SQUARE, "size": {"shortest_edge": 16}},
    "internvl": {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "max_patches": 2},
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
}
PROCESSOR: Mapping[str, Mapping[str, Any]] = {
    "llava": {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    "internvl": {"image_seq_length": 4},
    "gemma3": {"image_seq_length": 4},
}


def write_processor(path: Path, model_type: str) -> None:
    """The files with which a publisher describes how pictures become inputs."""
    family = "qwen" if model_type.startswith("qwen") else model_type
    for name, settings in (("preprocessor_config.json", PREPROCESSOR), ("processor_config.json", PROCESSOR)):
        if family in settings:
            (path / name).write_text(json.dumps(settings[family]), encoding="utf-8")
    template = TEMPLATE.replace("PICTURE", PICTURES.get(model_type, "<begin><image><end>"))
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_checkpoint(
    path: Path, model_type: str, settings: Mapping[str, Any], dtype: torch.dtype, shard_size: str
) -> None:
    """A language model with random weights in which no norm, bias or buffer is 0 or 1."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    torch.manual_seed(0)
    auto_class = AutoModelForMultimodalLM if "text_config" in settings else AutoModelForCausalLM
    model = auto_class.from_config(CONFIG_MAPPING[model_type](**settings), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
    if model_type == "qwen3_vl_moe":  # published as [experts, in, out], and save_pretrained does not turn them back
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.data = parameter.data.mT.contiguous()
    model.save_pretrained(path, max_shard_size=shard_size)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of lower-case letters, digits and the space, each a token of its own."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def vision_tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with tokens that stand for pictures."""
    return save_tokenizer(tmp_path_factory.mktemp("vision_tokenizer"), PLACEHOLDERS, ALIASES)


def save_tokenizer(path: Path, placeholders: Mapping[str, str] | None = None, aliases: Any = None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ("<pad>", "<s>", "</s>", *ALPHABET, *(placeholders or {}).values())
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if placeholders:
        special["extra_special_tokens"] = {**placeholders, **aliases}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stored(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path, vision_tokenizer_files: Path
) -> Callable[..., Path]:
    """Directory of a checkpoint; written once for equal arguments, so leave it alone."""
    written: dict[str, Path] = {}

    def find(model_type: str, dtype: torch.dtype = torch.bfloat16, shard_size: str = "1GB", **settings: Any) -> Path:
        key = repr((model_type, dtype, shard_size, settings))
        if key not in written:
            path = tmp_path_factory.mktemp(model_type)
            write_checkpoint(path, model_type, settings, dtype, shard_size)
            tokenizer = vision_tokenizer_files if "text_config" in settings else tokenizer_files
            shutil.copytree(tokenizer, path, dirs_exist_ok=True)
            if "vision_config" in settings:
                write_processor(path, model_type)
            written[key] = path
        return written[key]

    return find


@pytest.fixture
def llama(stored: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own that a test may change."""
    shutil.copytree(stored("llama", **COMMON), tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def fused_state() -> Callable[[Any], dict[str, torch.Tensor]]:
    """State and buffers of a transformers model, its stacked experts named and turned as the core has them."""

    def state(model: Any) -> dict[str, torch.Tensor]:
        tensors = dict(model.named_buffers()) | model.state_dict()
        for path, module in model.named_modules():
            if hasattr(module, "is_transposed"):
                for name, parameter in module.named_parameters(recurse=False):
                    del tensors[f"{path}.{name}"]
                    if name.endswith("_bias"):
                        tensors[f"{path}.{name.removesuffix('_bias')}.bias"] = parameter
                    else:
                        tensors[f"{path}.{name}.weight"] = parameter.mT if module.is_transposed else parameter
        return tensors

    return state


@pytest.fixture
def common() -> Mapping[str, Any]:
    """Settings of a tiny model."""
    return COMMON


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of different shapes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    paths = []
    for name, shape in (("a.png", (20, 24, 3)), ("b.jpg", (40, 16, 3))):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / name)
        paths.append(folder / name)
    return paths


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As the engine has it."""
    with torch.no_grad():
        yield
