# SPDX-License-Identifier: Apache-2.0
"""LLM Compressor on the demo's model: ``pip install torch==2.13.0 llmcompressor``, without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from peer import Job, cpu_seconds
from safetensors.torch import load_file


def scheme(bits: int, group: int | None = None, act: str = "", symmetric: bool = True) -> dict[str, Any]:
    """The arguments of a modifier that say what becomes what."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    if group:
        weights |= {"strategy": "group", "group_size": group}
    entry: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if act == "dynamic":
        entry["input_activations"] = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    if act == "static":
        entry["input_activations"] = {"num_bits": 8, "symmetric": False, "strategy": "tensor", "dynamic": False}
    return {"config_groups": {"all": entry}, "ignore": ["lm_head"]}


def rtn(*arguments: Any, **more: Any) -> list[Any]:
    return [QuantizationModifier(**scheme(*arguments, **more))]


def smoothed(strength: float, act: str) -> list[Any]:
    return [SmoothQuantModifier(smoothing_strength=strength), *rtn(8, act=act)]


METHODS = {
    "W8A8 dynamic rtn": lambda: rtn(8, act="dynamic"),
    "W8A8 dynamic smoothquant": lambda: smoothed(0.8, "dynamic"),
    "W8A8 static rtn": lambda: rtn(8, act="static"),
    "W8A8 static smoothquant": lambda: smoothed(0.8, "static"),
    "W8A16 rtn": lambda: rtn(8),
    "W4A16 g64 rtn": lambda: rtn(4, 64),
    "W4A16 g64 asymmetric rtn": lambda: rtn(4, 64, symmetric=False),
    "W4A16 g64 gptq": lambda: [GPTQModifier(**scheme(4, 64))],
    "W4A16 g64 awq": lambda: [AWQModifier(), *rtn(4, 64)],
    "W4A16 g64 asymmetric awq": lambda: [AWQModifier(), *rtn(4, 64, symmetric=False)],
    "W4A8 dynamic rtn": lambda: rtn(4, act="dynamic"),
    "W4A8 dynamic gptq": lambda: [GPTQModifier(**scheme(4, act="dynamic"))],
}


def main() -> None:
    job = Job(tuple(METHODS))
    if job.options.codes:
        print(json.dumps(compare(job)))
        return
    if "awq" in job.method:
        # It caches activations in pinned memory, which torch has only beside an accelerator.
        torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign, assignment]
    model = job.load()
    arguments: dict[str, Any] = {"model": model, "recipe": METHODS[job.method]()}
    if any(modifier.requires_calibration_data for modifier in arguments["recipe"]) or "static" in job.method:
        ids = job.samples()
        data = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        arguments |= {
            "dataset": Dataset.from_dict(data),
            "num_calibration_samples": ids.shape[0],
            "max_seq_length": ids.shape[1],
            "processor": job.tokenizer(),
        }
    cpu = cpu_seconds(lambda: oneshot(**arguments))
    job.report(version("llmcompressor"), model, cpu)


def compare(job: Job) -> dict[str, Any]:
    """How many scales, offsets and codes of ours equal those of this tool's own functions in float32."""
    group = 64 if "g64" in job.method else None
    entry = scheme(8 if "W8" in job.method else 4, group, symmetric="asymmetric" not in job.method)
    args = QuantizationArgs(**entry["config_groups"]["all"]["weights"])
    ours = load_file(job.options.codes)
    values, alike = Counter[str](), Counter[str]()
    parameters = dict(job.load(torch.float32).named_parameters())
    for name in sorted(key.removesuffix(".codes") for key in ours if key.endswith(".codes")):
        weight = parameters[name]
        rows = weight.view(weight.shape[0], -1, group or weight.shape[1])
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
        if args.symmetric:
            # Theirs spreads [-absmax, absmax] over 2 ** bits - 1 steps, ours over one fewer, so 0 is in the middle.
            steps, absmax = 2**args.num_bits - 1, rows.abs().amax(-1)
            if not torch.allclose(scale * steps / 2, absmax, rtol=1e-6):
                raise SystemExit(f"{name}: its scale is no longer 2 absmax / {steps}")
            scale = absmax / ((steps - 1) / 2)
        pairs = {"scale": (scale, ours[f"{name}.scale"])}
        codes, mine = quantize(weight, scale, zero, args), ours[f"{name}.codes"]
        if not args.symmetric:
            pairs["offset"] = (zero, ours[f"{name}.offset"])
            # It rounds after adding the zero point, we before: a half goes to the even number, which may be another.
            half = (rows / scale.unsqueeze(-1)).frac().abs().sub(0.5).abs().view_as(weight) < 1e-5
            codes, mine = codes[~half], mine[~half]
        pairs["codes"] = (codes, mine)
        for key, (one, other) in pairs.items():
            values[key] += one.numel()
            alike[key] += int((one == other).sum())
    return {"method": job.method, "values": values, "alike": alike}


if __name__ == "__main__":
    main()
