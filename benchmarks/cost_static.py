# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of ``quant`` W8A8 static over those of one plain float forward plus reading and writing.

Three child processes alternate, with the same environment and thread count:
    forward  imports transformers, loads the model in bf16, runs all samples once (hidden states only,
             without the vocabulary projection, which is the smaller baseline)
    copy     imports torch, reads all source tensors into memory and writes as many bytes as the result has
    quant    the command, W8A8 static on every linear
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from common import STATIC, demo_model, run, show, write_calibration, write_protocol

FORWARD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    for line in open(sys.argv[2]):
        run = model if sys.argv[3] == "logits" else model.model
        run(torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]), use_cache=False)
"""
COPY = """
import sys
from safetensors.torch import load_file, save_file
held = {name: tensor.clone() for name, tensor in load_file(sys.argv[1] + "/model.safetensors").items()}
from glob import glob
result = {}
for file in glob(sys.argv[2] + "/*.safetensors"):
    result.update(load_file(file))
save_file(result, sys.argv[3])
"""
IMPORTS = "import torch, transformers.models.llama.modeling_llama"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = demo_model(root)
        data = write_calibration(root / "data.jsonl", model, options.samples, options.tokens)
        protocol = write_protocol(root / "static.yaml", STATIC, dataset=str(data))
        result = root / "result"
        series: dict[str, list] = {"imports": [], "forward": [], "forward with logits": [], "quant": [], "copy": []}
        for _ in range(options.rounds):
            series["imports"].append(run("-c", IMPORTS))
            series["forward"].append(run("-c", FORWARD, str(model), str(data), "hidden"))
            series["forward with logits"].append(run("-c", FORWARD, str(model), str(data), "logits"))
            shutil.rmtree(result, ignore_errors=True)
            series["quant"].append(
                run("-m", "modelslim.cli.main", "quant", "--quiet", "--device", "cpu", "--model_path", str(model),
                    "--save_path", str(result), "--config_path", str(protocol))
            )  # fmt: skip
            series["copy"].append(run("-c", COPY, str(model), str(result), str(root / "copy.safetensors")))
        cost = {name: show(name, costs) for name, costs in series.items()}
        for forward in ("forward", "forward with logits"):
            whole = cost["quant"].cpu / (cost[forward].cpu + cost["copy"].cpu)
            imports = cost["imports"].cpu
            net = (cost["quant"].cpu - imports) / (cost[forward].cpu - imports + cost["copy"].cpu)
            print(f"quant / ({forward} + copy): {whole:.2f}; imports of transformers left out: {net:.2f}  (bound 1.3)")


if __name__ == "__main__":
    main()
