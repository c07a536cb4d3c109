# SPDX-License-Identifier: Apache-2.0
"""GPTQModel on the demo's model: ``pip install torch==2.13.0 gptqmodel``, without a GPU."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch
from peer import Job, cpu_seconds
from torch import Tensor

# With the single worker that it chooses on two cores it refuses to start.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

METHODS: dict[str, dict[str, Any]] = {
    "W4A16 g64 gptq": {},
    "W4A16 g64 gptq, desc_act": {"desc_act": True},
}


def weight_of(module: Any) -> Tensor:
    """Integers times scales in float32, [out, in]; read from its packed tensors."""
    packed = module.qweight.unsqueeze(1) >> torch.arange(0, 32, 4).view(1, -1, 1)  # eight neighbouring inputs a word
    codes = (packed & 15).flatten(0, 1) - 8
    return (codes * module.scales.float()[module.g_idx.long()]).t()


@torch.no_grad()
def main() -> None:
    job = Job(tuple(METHODS))
    result = job.load(torch.float32)  # before the import, which changes how models are loaded
    reference = job.load(torch.float32)
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.samples()]
    config = QuantizeConfig(bits=4, group_size=64, offload_to_disk=False, **METHODS[job.method])
    work = GPTQModel.load(str(job.options.model), config, device="cpu")
    cpu = cpu_seconds(lambda: work.quantize(samples, batch_size=1))
    for name, module in work.model.named_modules():
        if isinstance(module, BaseQuantLinear):
            result.get_submodule(name).weight.copy_(weight_of(module))
    job.report(version("gptqmodel"), result, cpu, reference)


if __name__ == "__main__":
    main()
