# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of many architectures, as save_pretrained writes them."""

from __future__ import annotations

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


def write_checkpoint(
    path: Path, model_type: str, settings: Mapping[str, Any], dtype: torch.dtype, shard_size: str
) -> None:
    """A causal language model with random weights in which no norm, bias or buffer is 0 or 1."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
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

    def find(model_type: str, dtype: torch.dtype = torch.bfloat16, shard_size: str = "1GB", **settings: Any) -> Path:
        key = repr((model_type, dtype, shard_size, settings))
        if key not in written:
            path = tmp_path_factory.mktemp(model_type)
            write_checkpoint(path, model_type, settings, dtype, shard_size)
            shutil.copytree(tokenizer_files, path, dirs_exist_ok=True)
            written[key] = path
        return written[key]

    return find


@pytest.fixture
def llama(stored: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own that a test may change."""
    shutil.copytree(stored("llama", **COMMON), tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def common() -> Mapping[str, Any]:
    """Settings of a tiny model."""
    return COMMON


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As the engine has it."""
    with torch.no_grad():
        yield
