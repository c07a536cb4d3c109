# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of the family as its publisher stores them: an expert a tensor, MTP layers, a vision tower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789Ġ"  # the last one is how byte-level tokenizers write a space
SPECIAL = ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
VOCABULARY = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", *ALPHABET, *SPECIAL))}
COMMON: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 32,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe": {**COMMON, "head_dim": 8, "attention_bias": True, "use_qk_norm": True, "n_group": 1},
    "glm4_moe_lite": {**COMMON, **LATENT, "num_key_value_heads": 4, "n_group": 1},
    "glm4v_moe": {
        "text_config": {**COMMON, "head_dim": 8, "rope_parameters": ROTARY},
        "vision_config": VISION,
        "image_token_id": VOCABULARY["<|image|>"],
        "video_token_id": VOCABULARY["<|image|>"],
        "image_start_token_id": VOCABULARY["<|begin_of_image|>"],
        "image_end_token_id": VOCABULARY["<|end_of_image|>"],
        "video_start_token_id": VOCABULARY["<|begin_of_video|>"],
        "video_end_token_id": VOCABULARY["<|end_of_video|>"],
    },
}
PREPROCESSOR = {
    "image_processor_type": "Glm4vImageProcessor",
    "processor_class": "Glm4vProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 1024},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def random(shape: Sequence[int], seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    return torch.randn(tuple(shape), generator=generator) * 0.1


def write_checkpoint(path: Path, model_type: str, mtp_layers: int) -> None:
    """A model in bfloat16 with random weights in which no norm, bias or buffer is 0 or 1."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    torch.manual_seed(0)
    auto_class = AutoModelForMultimodalLM if model_type == "glm4v_moe" else AutoModelForCausalLM
    settings = {"num_nextn_predict_layers": mtp_layers, **SETTINGS[model_type]}
    model = auto_class.from_config(CONFIG_MAPPING[model_type](**settings), dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor += random(tensor.shape, name).to(tensor.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # the published one is float32
            buffer.data = buffer.data.float() + random(buffer.shape, name)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    prefix = "model.language_model" if model_type == "glm4v_moe" else "model"
    for index in range(3, 3 + mtp_layers):
        tensors |= mtp_tensors(tensors, prefix, f"{prefix}.layers.{index}.")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def mtp_tensors(tensors: Mapping[str, Tensor], model: str, prefix: str) -> dict[str, Tensor]:
    """A multi-token prediction layer as it is published, its decoder layer like the model's last."""
    template, hidden = f"{model}.layers.2.", COMMON["hidden_size"]
    made = {
        name.replace(template, prefix): tensor + random(tensor.shape, prefix + name).to(tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(template)
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        made[f"{prefix}{name}.weight"] = (1 + random((hidden,), prefix + name)).bfloat16()
    made[f"{prefix}eh_proj.weight"] = random((hidden, 2 * hidden), prefix).bfloat16()
    made[f"{prefix}embed_tokens.weight"] = tensors[f"{model}.embed_tokens.weight"].clone()
    made[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return made


def write_processor(path: Path, model_type: str) -> None:
    """A byte-level tokenizer of letters, digits and the space, and the files that say how pictures become inputs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    if model_type == "glm4v_moe":
        (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        (path / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a checkpoint; written once for equal arguments, so leave it alone."""
    written: dict[tuple[str, int], Path] = {}

    def find(model_type: str, mtp_layers: int) -> Path:
        if (model_type, mtp_layers) not in written:
            path = tmp_path_factory.mktemp(model_type)
            write_checkpoint(path, model_type, mtp_layers)
            write_processor(path, model_type)
            written[model_type, mtp_layers] = path
        return written[model_type, mtp_layers]

    return find


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of different shapes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, shape in (("a.png", (20, 24, 3)), ("b.jpg", (40, 16, 3))):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(shape[0]))
        paths.append(folder / name)
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths
