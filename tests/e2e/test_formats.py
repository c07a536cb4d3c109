# SPDX-License-Identifier: Apache-2.0
"""Weight-only and MindIE checkpoints from the command to ``eval``, whose numbers are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelslim.evaluation import evaluate
from modelslim.run import quantize

Protocol = Callable[[str], Path]

TEXT = "by morning seven boats were under the river and nine oars in the fields " * 3
SHIFTS = torch.arange(0, 32, 4)


def protocol_of(saver: str, weight: str, act: str = "") -> str:
    return f"""\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        {act}
        weight: {weight}
      include: ["*"]
      exclude: ["*layers.1*down_proj"]
  save:
    - type: {saver}
      part_file_size: 0
"""


def grouped(dtype: str, symmetric: bool) -> str:
    return f"{{scope: per_group, dtype: {dtype}, symmetric: {symmetric}, method: minmax, ext: {{group_size: 32}}}}"


def gptq_weight(parts: Mapping[str, Tensor], version: int) -> Tensor:
    """[out, in] of 4 bits in float64."""
    codes = ((parts["qweight"].long().unsqueeze(1) >> SHIFTS.view(-1, 1)) & 15).flatten(0, 1)
    zeros = ((parts["qzeros"].long().unsqueeze(-1) >> SHIFTS) & 15).flatten(1) + (2 - version)
    group = parts["g_idx"].long()
    return ((codes - zeros[group]).double() * parts["scales"].double()[group]).t()


def awq_weight(parts: Mapping[str, Tensor]) -> Tensor:
    """[out, in] in float64."""
    shifts = SHIFTS[[0, 4, 1, 5, 2, 6, 3, 7]]
    codes = ((parts["qweight"].long().unsqueeze(-1) >> shifts) & 15).flatten(1)
    zeros = ((parts["qzeros"].long().unsqueeze(-1) >> shifts) & 15).flatten(1)
    size = len(codes) // len(zeros)
    scales = parts["scales"].double().repeat_interleave(size, 0)
    return ((codes - zeros.repeat_interleave(size, 0)).double() * scales).t()


@pytest.mark.parametrize(
    ("saver", "symmetric", "decode"),
    [
        ("gptq_saver", True, lambda parts: gptq_weight(parts, 1)),
        ("gptq_saver", False, lambda parts: gptq_weight(parts, 2)),
        ("awq_saver", True, awq_weight),
        ("awq_saver", False, awq_weight),
    ],
)
def test_perplexity_is_that_of_transformers_with_the_stored_weights(
    saver: str,
    symmetric: bool,
    decode: Callable[[Mapping[str, Tensor]], Tensor],
    tiny_llama: Path,
    tmp_path: Path,
    protocol: Protocol,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "out"
    quantize(tiny_llama, path, protocol(protocol_of(saver, grouped("int4", symmetric))), device="cpu")
    found = evaluate(path, tiny_llama, TEXT, window=64, device="cpu")

    tensors = load_file(path / "model.safetensors")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    assert len(names) == 3 * 7 - 1
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for name in names:
            parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            model.get_submodule(name).weight.copy_(decode(parts))
        ids = torch.tensor([AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]])
        losses = []
        for part in ids.split(64, 1):
            if part.shape[1] > 1:
                log = model(part).logits[0, :-1].double().log_softmax(-1)
                losses.append(-log.gather(1, part[0, 1:, None]))
    assert found.kl > 1e-3
    assert found.quantized_perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


@pytest.mark.parametrize("saver", ["gptq_saver", "awq_saver"])
def test_experts_are_stored_one_by_one_and_read_back(
    saver: str, tiny_moe: Path, tmp_path: Path, protocol: Protocol
) -> None:
    path = tmp_path / "out"
    text = protocol_of(saver, grouped("int4", True)).replace('exclude: ["*layers.1*down_proj"]', 'exclude: ["*gate"]')
    quantize(tiny_moe, path, protocol(text), device="cpu")
    tensors = load_file(path / "model.safetensors")
    experts = [key for key in tensors if ".experts." in key and key.endswith(".qweight")]
    assert len(experts) == 2 * 4 * 3
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    router = "model.layers.0.mlp.gate"
    if saver == "awq_saver":
        assert router in config["modules_to_not_convert"]
    else:
        assert router not in config["modules_in_block_to_quantize"][0]
    found = evaluate(path, tiny_moe, TEXT, window=64, device="cpu")
    assert 1e-4 < found.kl < 1


def test_mindie_computes_what_ascendv1_computes(tiny_llama: Path, tmp_path: Path, protocol: Protocol) -> None:
    act = "act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}"
    weight = "{scope: per_channel, dtype: int8, symmetric: True, method: minmax}"
    results: dict[str, Any] = {}
    for saver in ("ascendv1_saver", "mindie_format_saver"):
        path = tmp_path / saver
        text = protocol_of(saver, weight, act).replace('exclude: ["*layers.1*down_proj"]', "exclude: []")
        quantize(tiny_llama, path, protocol(text), device="cpu")
        results[saver] = evaluate(path, tiny_llama, TEXT, window=64, device="cpu")
    names = {file.name for file in (tmp_path / "mindie_format_saver").iterdir()}
    assert {"quant_model_weight_w8a8_dynamic.safetensors", "quant_model_description_w8a8_dynamic.json"} <= names
    assert results["mindie_format_saver"].kl == pytest.approx(results["ascendv1_saver"].kl, rel=0.2)
    assert 0 < results["mindie_format_saver"].kl < 0.1
