# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint with transformers and GPTQModel as a user would, and writes what they make of it.

Run by the tests in a process of its own: ``python gptqmodel_run.py MODEL TOKENS RESULT``, where TOKENS is a JSON list
of numbers and RESULT a safetensors file for the logits float32 [tokens, vocabulary] and, by the name of each
quantized linear, the weight float32 [out, in] with which it multiplies. Imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# Kernels are neither compiled nor traced: what is read is the same, and nothing has to be built.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
BACKENDS = {"gptq": "gptq_torch", "awq": "torch_awq"}


def run(model_path: Path, tokens: list[int], result: Path) -> None:
    """Load, read the prompt, and write."""
    import torch
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    section = config["quantization_config"]
    section["backend"] = BACKENDS[section["quant_method"]]
    with TemporaryDirectory() as place:
        for file in model_path.iterdir():
            if file.name != "config.json":
                (Path(place) / file.name).symlink_to(file.resolve())
        (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=config["dtype"], device_map="cpu", output_loading_info=True
        )
    left = {what: names for what, names in info.items() if names}
    if left:
        raise RuntimeError(f"not every tensor found its place: {left}")
    written = {}
    with torch.no_grad():
        written["logits"] = model(torch.tensor([tokens])).logits[0].float()
        for name, module in model.named_modules():
            if isinstance(module, BaseQuantLinear):
                module.bias = None
                one = torch.eye(module.in_features, dtype=model.dtype)
                written[name] = module(one).t().float().contiguous()
    save_file(written, result)


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
