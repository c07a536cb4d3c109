# SPDX-License-Identifier: Apache-2.0
"""Perplexity over that of the float model, of a small mixture of experts and of its twin with outliers.

The twin computes the same function with a few channels 64 times as large, in each of the places where a scale
can be folded. What is plain falls apart on it; smoothing must bring it back. The folder holds both models,
``NAME`` and ``NAME-outlier``, and ``data/calib_*.npy`` and ``data/eval_*.npy``, token ids of several domains.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import DYNAMIC, INT8, STATIC

SAMPLES, WINDOW = 12, 256

SCHEMES = {
    "W8A8 static": f"act: {{{STATIC}}}, weight: {{{INT8}}}",
    "W8A8 dynamic": f"act: {{{DYNAMIC}}}, weight: {{{INT8}}}",
}
SMOOTHING = {
    "plain": "",
    "smooth_quant": "{type: smooth_quant}",
    "iter_smooth": "{type: iter_smooth, alpha: 0.5}",
    "flex_smooth_quant": "{type: flex_smooth_quant, qconfig: {SCHEME}}",
    "flex_awq_ssz": "{type: flex_awq_ssz, qconfig: {SCHEME}}",
}
BOUND = 1.01
"""What smoothing in all subgraphs must stay below on the twin; ``smooth_quant`` works behind norms alone."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds the models and data/")
    parser.add_argument("--name", default="qwen3-moe-tiny", help="of the model without outliers")
    parser.add_argument("--only", default="", help="measure what contains this, such as static or iter")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder / options.name)
    texts = {
        kind: {file.stem: _texts(tokenizer, file) for file in sorted((options.folder / "data").glob(f"{kind}_*.npy"))}
        for kind in ("calib", "eval")
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        samples = [text for domain in texts["calib"].values() for text in domain]
        (root / "calibration.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in samples))
        for scheme, qconfig in SCHEMES.items():
            for name, entry in SMOOTHING.items():
                if options.only not in f"{scheme} {name}":
                    continue
                process = [entry.replace("SCHEME", qconfig)] if entry else []
                process.append(f"{{type: linear_quant, qconfig: {{{qconfig}}}}}")
                ratios = [
                    _ratio(options.folder / f"{options.name}{twin}", process, texts["eval"], root)
                    for twin in ("", "-outlier")
                ]
                print(
                    f"{scheme:13s} {name:18s} perplexity x {ratios[0]:.4f}  with outliers x {ratios[1]:.4f}", flush=True
                )
    print(json.dumps({"samples of a domain": SAMPLES, "tokens of a sample": WINDOW, "bound": BOUND}))


def _ratio(model: Path, process: list[str], texts: dict[str, list[str]], root: Path) -> float:
    """Geometric mean over the domains of the perplexity over that of the float model."""
    from modelslim.evaluation import evaluate
    from modelslim.run import quantize

    entries = "".join(f"    - {entry}\n" for entry in process)
    protocol = root / "protocol.yaml"
    protocol.write_text(
        f"apiversion: modelslim_v1\nspec:\n  process:\n{entries}  save:\n    - type: ascendv1_saver\n"
        f"  dataset: {root / 'calibration.jsonl'}\n"
    )
    with tempfile.TemporaryDirectory(dir=root) as out:
        quantize(model, Path(out) / "quantized", protocol, device="cpu")
        results = [
            evaluate(Path(out) / "quantized", model, "".join(domain), window=WINDOW, device="cpu")
            for domain in texts.values()
        ]
    logs = [math.log(result.quantized_perplexity / result.float_perplexity) for result in results]
    return math.exp(sum(logs) / len(logs))


def _texts(tokenizer: Any, file: Path) -> list[str]:
    ids = np.load(file).reshape(-1)[: SAMPLES * WINDOW].astype(np.int64).tolist()
    return [tokenizer.decode(ids[start : start + WINDOW]) for start in range(0, len(ids), WINDOW)]


if __name__ == "__main__":
    main()
