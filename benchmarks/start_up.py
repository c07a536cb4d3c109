# SPDX-License-Identifier: Apache-2.0
"""Seconds of ``modelslim --help``, and of ``plan`` for a model of 100 layers whose weights were never written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from common import DYNAMIC, STATIC, run, show, write_protocol

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 8192, 28672, 128256, 100


def sparse_model(target: Path) -> Path:
    """A Llama of 87 billion parameters, as headers over a file with a hole for data."""
    target.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN), ("self_attn.k_proj", 1024, HIDDEN),
            ("self_attn.v_proj", 1024, HIDDEN), ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN), ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (HIDDEN,)
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    file = target / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + position)
    return target


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = sparse_model(root / "model")
        show("modelslim --help  (bound 0.3 s)", [run("-m", "modelslim.cli.main", "--help") for _ in range(7)])
        for name, act in (("data-free", DYNAMIC), ("calibrating, its forward proven", STATIC)):
            protocol = write_protocol(root / f"{name}.yaml", act)
            plan = ("plan", "--device", "cpu", "--model_path", str(model), "--config_path", str(protocol))
            seconds = [run("-m", "modelslim.cli.main", *plan) for _ in range(3)]
            show(f"modelslim plan, 100 layers, {name}  (bound 5 s)", seconds)


if __name__ == "__main__":
    main()
