# SPDX-License-Identifier: Apache-2.0
"""CPU seconds per layer of fused experts over a dense layer with as many parameters and multiplications.

A token passes ``top`` of the experts, so the dense model, whose MLP is as wide as all experts
together, gets as many fewer tokens. Attention is W8A8 static, so that both are calibrated; MLP and
experts are W8A8_DYNAMIC. Both run in one process, after all imports, and alternate.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import DYNAMIC, INT8, STATIC, demo_model, write_calibration

from modelslim.run import quantize

PROTOCOL = f"""\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      include: ["*self_attn*"]
      qconfig: {{act: {{{STATIC}}}, weight: {{{INT8}}}}}
    - type: linear_quant
      include: ["*mlp*"]
      qconfig: {{act: {{{DYNAMIC}}}, weight: {{{INT8}}}}}
  save:
    - type: ascendv1_saver
  dataset: %s
"""
HIDDEN, INNER, SAMPLES = 512, 1024, 16


def write_model(path: Path, tokenizer: Path, **settings: Any) -> Path:
    """A random checkpoint with the demo's tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    common = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    kind = settings.pop("model_type")
    config = CONFIG_MAPPING[kind](**common, **settings, vocab_size=49152, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, path)
    return path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sample that passes the experts")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        demo = demo_model(root)
        experts = {"num_experts": options.experts, "num_experts_per_tok": options.top, "moe_intermediate_size": INNER}
        models = {
            "fused experts": write_model(
                root / "moe", demo, model_type="qwen3_moe", num_hidden_layers=options.layers, **experts
            ),
            "dense": write_model(
                root / "dense",
                demo,
                model_type="qwen3",
                num_hidden_layers=options.layers,
                intermediate_size=INNER * options.experts,
            ),
        }
        tokens = {"fused experts": options.tokens, "dense": options.tokens * options.top // options.experts}
        protocols = {}
        for name in models:
            data = write_calibration(root / f"{name}.jsonl", demo, SAMPLES, tokens[name])
            protocols[name] = root / f"{name}.yaml"
            protocols[name].write_text(PROTOCOL % json.dumps(str(data)))
        costs: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(options.rounds + 1):
            for name, model in models.items():
                shutil.rmtree(root / "result", ignore_errors=True)
                start = time.process_time()
                quantize(model, root / "result", protocols[name], device="cpu")
                if round_:  # the first round pays for imports and the first touch of everything
                    costs[name].append(time.process_time() - start)
    for name, series in costs.items():
        print(f"{name:16s} {median(series):7.3f} CPU s for {options.layers} layers, {tokens[name]} tokens a sample")
    print(f"ratio of medians {median(costs['fused experts']) / median(costs['dense']):7.2f}  (bound 1.5)")


if __name__ == "__main__":
    main()
