# SPDX-License-Identifier: Apache-2.0
"""AutoRound on the demo's model: ``pip install torch==2.13.0 auto-round``, without a GPU."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from auto_round import AutoRound
from peer import Job, cpu_seconds
from torch import nn

ITERATIONS = 30  # of the 200 that it does by default: these alone take several minutes
METHODS: dict[str, dict[str, Any]] = {
    "W8A8 dynamic rtn": {"scheme": "INT8", "iters": 0, "disable_opt_rtn": True},
    "W8A16 rtn": {"scheme": "W8A16", "iters": 0, "disable_opt_rtn": True, "group_size": -1},
    "W4A16 g64 rtn": {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": True, "group_size": 64},
    "W4A16 g64 optimized rtn": {"scheme": "W4A16", "iters": 0, "group_size": 64},
    "W4A16 g64 awq": {"scheme": "W4A16", "group_size": 64, "alg_configs": ["awq", "rtn"]},
    f"W4A16 g64 autoround, {ITERATIONS} iterations": {"scheme": "W4A16", "group_size": 64, "iters": ITERATIONS},
}


def main() -> None:
    job = Job(tuple(METHODS))
    model, ids = job.load(), job.samples()
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # as it does itself: a mask of ones alone would become none on its way
    work = AutoRound(
        model,
        job.tokenizer(),
        dataset=[{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(len(ids))],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        **METHODS[job.method],
    )
    cpu = cpu_seconds(work.quantize)
    job.report(version("auto-round"), exact(work.model), cpu)


@torch.no_grad()
def exact(model: nn.Module) -> nn.Module:
    """The model in float32, its weights integers times scales, which it holds rounded to bfloat16."""
    model.float()
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and getattr(linear, "scale", None) is not None:
            scale = linear.scale.float().view(linear.out_features, -1, 1)
            steps = linear.weight.view(linear.out_features, scale.shape[1], -1) / scale
            weight = (steps.round() * scale).view_as(linear.weight)
            if not torch.allclose(weight, linear.weight, rtol=2**-8, atol=0):
                raise SystemExit(f"{name} holds no multiples of its scale")
            linear.weight.copy_(weight)
    return model


if __name__ == "__main__":
    main()
