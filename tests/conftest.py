# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints, protocols and data that all tests share.

Checkpoints are made once per test session and must not be written to; copy one to damage it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tests run on tiny tensors, for which more threads only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = (
    "The river rose in the night, and by morning the lower fields were under water.",
    "A scale maps a range of numbers onto the codes; the range of the codes is what the type allows.",
    "She counted the boats twice: eleven in the harbour, one on the sand, none at sea.",
    "def area(width, height):\n    return width * height",
    "Numbers 0 1 2 3 4 5 6 7 8 9, and a few signs: + - * / = < > ( ) [ ] { }.",
    "La pluie tombe sur les toits. Der Regen fällt auf die Dächer. 雨が屋根に降る。",
)

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

Protocol = Callable[[str], Path]
LlamaFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def calibration_texts() -> tuple[str, ...]:
    """The texts of ``calibration_file``, on which the tiny tokenizer was trained too."""
    return TEXTS


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration set: one record with ``text`` per line."""
    file = tmp_path_factory.mktemp("calibration") / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most 512 tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def llama_factory(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> LlamaFactory:
    """``llama_factory(max_shard_size="50GB", seed=0, **config)`` -> Path of a new random llama checkpoint, bf16."""

    def make(max_shard_size: str = "50GB", seed: int = 0, **changes: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "bfloat16",
        }
        path = tmp_path_factory.mktemp("llama")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
            for name, parameter in model.named_parameters():
                # Fresh norms are all ones and fresh biases all zeros, which would hide a mix-up.
                if "norm" in name or name.endswith(".bias"):
                    torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
            model.to(torch.bfloat16).save_pretrained(path, max_shard_size=max_shard_size)
        tiny_tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_llama(llama_factory: LlamaFactory) -> Path:
    """A llama of three layers, its lm_head not tied to the embedding, in one file."""
    return llama_factory()


@pytest.fixture(scope="session")
def tiny_llama_tied(llama_factory: LlamaFactory) -> Path:
    """A llama of three layers whose lm_head is the embedding; ``lm_head.weight`` is not stored."""
    return llama_factory(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_llama_sharded(llama_factory: LlamaFactory) -> Path:
    """The same weights as ``tiny_llama`` in several files with an index."""
    return llama_factory(max_shard_size="100KB")


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A qwen3_moe of two layers with four experts each, which transformers holds fused and stores one by one."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("moe")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    """``protocol(text)`` -> Path of a YAML file that holds the text."""
    count = 0

    def write(text: str) -> Path:
        nonlocal count
        count += 1
        file = tmp_path / f"protocol{count}.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def w8a8_static(calibration_file: Path) -> str:
    """YAML: every linear of the layers int8, activations int8 per tensor (asymmetric), calibrated."""
    return f"""\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {{scope: per_tensor, dtype: int8, symmetric: False, method: minmax}}
        weight: {{scope: per_channel, dtype: int8, symmetric: True, method: minmax}}
      include: ["*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset: {calibration_file}
"""


@pytest.fixture(scope="session")
def w8a8_dynamic() -> str:
    """YAML: every linear of the layers int8, activations int8 per token; needs no calibration."""
    return """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
"""


@pytest.fixture(scope="session")
def w8a16() -> str:
    """YAML: every linear of the layers int8, activations left alone."""
    return """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
"""
