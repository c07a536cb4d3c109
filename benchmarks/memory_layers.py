# SPDX-License-Identifier: Apache-2.0
"""Peak memory of ``quant`` against the number of layers, static and data-free, beside that of the imports."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from common import DYNAMIC, STATIC, demo_model, run, write_calibration, write_protocol

IMPORTS = "import torch, transformers.models.llama.modeling_llama"


def random_model(target: Path, tokenizer: Path, layers: int) -> Path:
    """A random Llama of 39 MB a layer, with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(target)
    return target


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        demo = demo_model(root)
        data = write_calibration(root / "data.jsonl", demo, 8, 512)
        protocols = {
            "static": write_protocol(root / "static.yaml", STATIC, dataset=str(data)),
            "data-free": write_protocol(root / "dynamic.yaml", DYNAMIC),
        }
        imports = run("-c", IMPORTS).peak_mb
        print(f"imports of torch and transformers: {imports:.0f} MB")
        peaks: dict[tuple[str, int], float] = {}
        for layers in (options.layers, 4 * options.layers):
            model = random_model(root / "model", demo, layers)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
            for name, protocol in protocols.items():
                cost = run(
                    "-m", "modelslim.cli.main", "quant", "--quiet", "--device", "cpu", "--model_path", str(model),
                    "--save_path", str(root / "result"), "--config_path", str(protocol),
                )  # fmt: skip
                peaks[name, layers] = cost.peak_mb
                print(f"{layers:3d} layers, {size:5.0f} MB, {name:9s}: peak {cost.peak_mb:.0f} MB, "
                      f"{cost.peak_mb - imports:.0f} MB above the imports", flush=True)  # fmt: skip
                shutil.rmtree(root / "result")
            shutil.rmtree(model)
        for name in protocols:
            ratio = peaks[name, 4 * options.layers] / peaks[name, options.layers]
            print(f"{name}: 4 times the layers need {ratio:.3f} times the peak memory  (bound 1.05)")


if __name__ == "__main__":
    main()
