# SPDX-License-Identifier: Apache-2.0
"""float8 caches: written, read back, and loaded by transformers without a tensor too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modelslim.api import ModelError, ProtocolError
from modelslim.saved import load_model
from modelslim_compressed_tensors.caches import SCHEME, read_caches

Source = Callable[..., Path]
Result = Callable[..., Path]

LINEARS = {"type": "linear_quant", "qconfig": {"act": {"scope": "per_token"}, "weight": {}}}
CACHES = {"type": "dynamic_cache", "qconfig": {"dtype": "fp8_e4m3", "scope": "per_tensor"}}
TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8, 2, 28, 11, 6]])
NAME = "model.layers.0.self_attn"


def test_scales_and_scheme_are_those_that_engines_read(source: Source, result: Result) -> None:
    path = result(source("llama", "bfloat16"), LINEARS, CACHES)
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith((".k_scale", ".v_scale"))}
    assert set(scales) == {f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"}
    assert all(scale.shape == (1,) and scale.dtype == torch.bfloat16 and scale > 0 for scale in scales.values())
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    parsed = QuantizationArgs.model_validate(config["kv_cache_scheme"])  # the engine's own reading
    assert (parsed.num_bits, parsed.type, parsed.strategy, parsed.dynamic) == (8, "float", "tensor", False)


def test_transformers_loads_them_and_generates(source: Source, result: Result) -> None:
    path = result(source("llama", "bfloat16"), LINEARS, CACHES)
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert model.eval().generate(TOKENS, min_new_tokens=5, max_new_tokens=5, do_sample=False).shape == (1, 15)


def test_saved_model_computes_with_the_cache(source: Source, result: Result) -> None:
    model = source("llama", "float32")
    with torch.no_grad():
        plain, cached = (
            load_model(result(model, *entries), model, device="cpu")(input_ids=TOKENS, use_cache=False).logits
            for entries in ((LINEARS,), (LINEARS, CACHES))
        )
    assert 0 < (plain - cached).abs().max() < 0.3 * plain.std()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((LINEARS, {"type": "dynamic_cache"}), "in fp8_e4m3 per_tensor only"),
        ((LINEARS, {**CACHES, "include": ["*.0.self_attn"]}), "of all attentions or of none"),
        ((CACHES,), "with quantized linears only"),
    ],
)
def test_what_engines_do_not_read_is_refused(
    entries: tuple[dict[str, Any], ...], message: str, source: Source, result: Result
) -> None:
    with pytest.raises(ProtocolError) as error:
        result(source("llama", "float32"), *entries)
    assert any(message in str(one) for one in error.value.diagnostics)


@pytest.mark.parametrize(
    ("scheme", "names", "message"),
    [
        (None, ["k_scale", "v_scale"], "no kv_cache_scheme"),
        (SCHEME, [], "no k_scale is stored"),
        (SCHEME, ["k_scale"], "v_scale of a cache is missing"),
        ({**SCHEME, "type": "int"}, ["k_scale", "v_scale"], "not known here"),
    ],
)
def test_contradictions_are_errors(scheme: Any, names: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_caches({"kv_cache_scheme": scheme}, {f"{NAME}.{name}": (1,) for name in names})
