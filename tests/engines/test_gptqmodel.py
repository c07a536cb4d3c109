# SPDX-License-Identifier: Apache-2.0
"""transformers, with GPTQModel, loads our gptq and awq checkpoints, and multiplies with the weights that we simulate.

An environment of its own has GPTQModel: ``tox -e gptqmodel``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelslim.quantized import QuantizedLinear
from modelslim.run import quantize
from modelslim.saved import load_model

LAYERS = ["*"]
PARTS = ["*layers.0*", "*self_attn*"]
HEAD = ["*layers.1*", "lm_head"]
TOKENS = [index * 7 % 512 for index in range(24)]


def weight(dtype: str, group_size: int | None, symmetric: bool = True) -> Mapping[str, Any]:
    scope = {"scope": "per_group", "group_size": group_size} if group_size else {"scope": "per_channel"}
    return {"weight": {**scope, "dtype": dtype, "symmetric": symmetric, "method": "minmax"}}


@pytest.mark.parametrize(
    ("saver", "qconfig", "include"),
    [
        ("gptq_saver", weight("int4", 64), LAYERS),
        ("gptq_saver", weight("int4", 32, symmetric=False), PARTS),
        ("gptq_saver", weight("int8", None), LAYERS),
        ("gptq_saver", weight("int3", 32), LAYERS),
        ("gptq_saver", weight("int2", 16, symmetric=False), LAYERS),
        ("gptq_saver", weight("int4", 64), HEAD),
        ("awq_saver", weight("int4", 64), LAYERS),
        ("awq_saver", weight("int4", 32, symmetric=False), PARTS),
        ("awq_saver", weight("int4", None, symmetric=False), LAYERS),
    ],
)
def test_every_linear_has_the_weight_that_we_simulate(
    saver: str,
    qconfig: Mapping[str, Any],
    include: list[str],
    tiny_qwen2: Callable[[str], Path],
    protocol: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source, path = tiny_qwen2("float16"), tmp_path / "result"
    process = {"type": "linear_quant", "qconfig": qconfig, "include": include}
    spec = {"process": [process], "save": [{"type": saver}]}
    quantize(source, path, protocol(json.dumps({"apiversion": "modelslim_v1", "spec": spec})), device="cpu")
    script = Path(__file__).with_name("gptqmodel_run.py")
    command = [sys.executable, str(script), str(path), json.dumps(TOKENS), str(tmp_path / "result.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(tmp_path / "result.safetensors")
    logits = found.pop("logits")

    model = load_model(path, source, device="cpu")
    ours = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found.keys() == ours.keys()
    for name, module in ours.items():
        # They multiply in float16, whose numbers have 11 bits.
        torch.testing.assert_close(found[name], module.weight.dequantize(), rtol=2**-10, atol=1e-6, msg=name)
    with torch.no_grad():
        expected = model.float()(input_ids=torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)
    actual = logits.double().log_softmax(-1)
    assert float((actual.exp() * (actual - expected)).sum(-1).mean()) < 1e-4
