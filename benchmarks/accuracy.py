# SPDX-License-Identifier: Apache-2.0
"""Mean KL to the float model of our schemes on the demo's model, beside LLM Compressor's round-to-nearest.

Both are measured on the same text in the same windows, all floating arithmetic in float32; ours from the saved
tensors, LLM Compressor's from the model that it leaves in memory. Give its interpreter with --llmcompressor, since it
wants an environment of its own (``pip install torch==2.13.0 llmcompressor``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import DYNAMIC, ENVIRONMENT, FLOAT, INT8, STATIC, demo_model, write_calibration, write_protocol

PEER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
path, text, tokens, window = sys.argv[1], open(sys.argv[2]).read(), int(sys.argv[3]), int(sys.argv[4])
load = lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
model, reference = load(), load().float()
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]))
model.float()
ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :tokens]
total = count = 0
with torch.no_grad():
    for part in ids.split(window, dim=1):
        p, q = (m(part).logits[0].float().log_softmax(-1) for m in (reference, model))
        total += float((p.exp() * (p - q)).sum()); count += p.shape[0]
print("KL", total / count)
"""


@dataclass(frozen=True)
class Scheme:
    """A row of the table."""

    name: str
    act: str
    weight: str
    bound: str


SCHEMES = (
    Scheme("W8A8 dynamic, per token", DYNAMIC, INT8, "0.028 to 0.033, and not above LLM Compressor"),
    Scheme("W8A16 per channel", FLOAT, INT8, "0.003"),
    Scheme("W8A8 static, per tensor, no smoothing", STATIC, INT8, "reported as it is: 0.64 to 0.9 for every tool"),
    Scheme(
        "W4A16 group 64, symmetric", FLOAT, "scope: per_group, dtype: int4, symmetric: true, group_size: 64", "none yet"
    ),
    Scheme(
        "W4A16 group 64, asymmetric",
        FLOAT,
        "scope: per_group, dtype: int4, symmetric: false, group_size: 64",
        "none yet",
    ),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llmcompressor", help="Python interpreter that has LLM Compressor")
    parser.add_argument("--text", type=Path, help="text to read; default: the one that eval reads")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    import modelslim.calibration
    from modelslim.evaluation import evaluate
    from modelslim.run import quantize

    text = options.text or Path(modelslim.calibration.__file__).parent / "eval_english.txt"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = demo_model(root)
        data = write_calibration(root / "data.jsonl", model, 16, 512)
        for number, scheme in enumerate(SCHEMES):
            protocol = write_protocol(root / f"{number}.yaml", scheme.act, scheme.weight, str(data))
            report = quantize(model, root / str(number), protocol, device="cpu")
            result = evaluate(root / str(number), model, text.read_text(), max_tokens=options.tokens)
            print(f"{scheme.name:40s} KL {result.kl:8.5f}  perplexity {result.float_perplexity:.2f} -> "
                  f"{result.quantized_perplexity:.2f}  {report['bytes_after'] / 1e6:.0f} MB  ({scheme.bound})",
                  flush=True)  # fmt: skip
        if options.llmcompressor:
            done = subprocess.run(
                [options.llmcompressor, "-c", PEER, str(model), str(text), str(options.tokens), "512"],
                env=ENVIRONMENT, capture_output=True, text=True,
            )  # fmt: skip
            line = next((line for line in done.stdout.splitlines() if line.startswith("KL ")), None)
            if line is None:
                raise SystemExit(f"LLM Compressor failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            print(f"{'LLM Compressor, W8A8 round-to-nearest':40s} KL {float(line.split()[1]):8.5f}")
            print(json.dumps({"text": str(text), "tokens": options.tokens}))


if __name__ == "__main__":
    main()
