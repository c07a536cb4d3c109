# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of the family as its publisher stores them: an expert a tensor, MTP layers, bfloat16 or float8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = (16, 24)
"""Neither divides all sizes below, so that the last blocks are cut off."""
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789Ġ"  # the last one is how byte-level tokenizers write a space
COMMON: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v3": {},
    "deepseek_v32": {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
}


def random(shape: tuple[int, ...], seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, seed)))
    return torch.randn(shape, generator=generator) * 0.1


def write_float(path: Path, model_type: str, mtp_layers: int) -> None:
    """A model in bfloat16 with random weights in which no norm or buffer is 0 or 1."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**COMMON, **SETTINGS[model_type], num_nextn_predict_layers=mtp_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor += random(tuple(tensor.shape), name).to(tensor.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # the published one is float32, and needs it
            buffer.data = buffer.data.float() + random(tuple(buffer.shape), name)
    model.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    # As published: code for transformers 4, which must not be wanted.
    values["auto_map"] = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    (path / "config.json").write_text(json.dumps(values))
    tensors = load_file(path / "model.safetensors")
    last = f"model.layers.{COMMON['num_hidden_layers'] - 1}."
    for index in range(COMMON["num_hidden_layers"], COMMON["num_hidden_layers"] + mtp_layers):
        tensors |= mtp_tensors(tensors, last, f"model.layers.{index}.")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def mtp_tensors(tensors: Mapping[str, Tensor], template: str, prefix: str) -> dict[str, Tensor]:
    """A multi-token prediction layer with the names that DeepSeek-V3 gives it."""
    made = {
        name.replace(template, prefix): tensor + random(tuple(tensor.shape), prefix + name).to(tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(template)
    }
    hidden = COMMON["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        made[f"{prefix}{name}.weight"] = (1 + random((hidden,), prefix + name)).bfloat16()
    made[f"{prefix}eh_proj.weight"] = random((hidden, 2 * hidden), prefix).bfloat16()
    made[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    made[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return made


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight: each block is scaled so that its largest value becomes 448."""
    rows, columns = BLOCK
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = []
    for row in range(0, weight.shape[0], rows):
        for column in range(0, weight.shape[1], columns):
            block = weight[row : row + rows, column : column + columns].float()
            scales.append(block.abs().max() / 448)
            codes[row : row + rows, column : column + columns] = (block / scales[-1]).to(torch.float8_e4m3fn)
    return codes, torch.stack(scales).view(-(-weight.shape[0] // rows), -1)


def is_linear(name: str) -> bool:
    """True for what DeepSeek stores in float8: the linears of the layers, without routers and the MTP projection."""
    kept = ("norm.weight", "gate.weight", "eh_proj.weight", "embed_tokens.weight", "head.weight", "weights_proj.weight")
    return ".layers." in name and name.endswith(".weight") and not name.endswith(kept)


def to_float8(path: Path) -> None:
    """Store the linears of a checkpoint in blocks of float8."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if is_linear(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_float8(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of lower-case letters, digits and the space, each a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", *ALPHABET))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Callable[..., Path]:
    """Directory of a checkpoint; written once for equal arguments, so leave it alone."""
    written: dict[str, Path] = {}

    def find(model_type: str = "deepseek_v3", mtp_layers: int = 1, float8: bool = False) -> Path:
        key = repr((model_type, mtp_layers, float8))
        if key not in written:
            path = tmp_path_factory.mktemp(model_type)
            write_float(path, model_type, mtp_layers)
            if float8:
                to_float8(path)
            shutil.copytree(tokenizer_files, path, dirs_exist_ok=True)
            written[key] = path
        return written[key]

    return find
