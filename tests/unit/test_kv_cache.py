# SPDX-License-Identifier: Apache-2.0
"""Quantized key/value caches, against what transformers itself puts into a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.errors import ModelError, ProtocolError
from modelslim.evaluation import evaluate
from modelslim.kv_cache import QuantizedCache, find_places, open_places
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.saved import load_model
from modelslim.types import AttentionCache, TensorSpec
from modelslim.verify import verify

ATTENTION = "model.layers.1.self_attn"
YAML = """\
apiversion: modelslim_v1
spec:
  process:
{entries}
  save:
    - type: ascendv1_saver
  dataset: {dataset}
"""


@pytest.fixture
def write(protocol: Callable[[str], Path], calibration_file: Path) -> Callable[..., Path]:
    """``write(*entries)`` -> a protocol of these entries."""

    def make(*entries: str) -> Path:
        return protocol(YAML.format(entries="\n".join(f"    - {one}" for one in entries), dataset=calibration_file))

    return make


def float_caches(model: Path, texts: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of the float model over all texts, [tokens, heads * size]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for text in texts:
        with torch.no_grad():
            output = network(tokenizer(text, return_tensors="pt").input_ids, use_cache=True)
        flat = [
            tuple(x[0].transpose(0, 1).flatten(1) for x in (layer.keys, layer.values))
            for layer in output.past_key_values.layers
        ]
        parts.append(flat)  # type: ignore[arg-type]
    return [
        (torch.cat([part[layer][0] for part in parts]), torch.cat([part[layer][1] for part in parts]))
        for layer in range(len(parts[0]))
    ]


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_what_transformers_keeps(
    symmetric: bool, write: Callable[..., Path], tiny_llama: Path, tmp_path: Path, calibration_texts: tuple[str, ...]
) -> None:
    entry = f"{{type: dynamic_cache, qconfig: {{symmetric: {str(symmetric).lower()}}}}}"
    quantize(tiny_llama, tmp_path / "out", write(entry), device="cpu")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(file)
    for layer, pair in enumerate(float_caches(tiny_llama, calibration_texts)):
        for part, kept in zip("kv", pair, strict=True):
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            scale, offset = stored[f"{name}.kv_cache_scale"], stored[f"{name}.kv_cache_offset"]
            assert scale.dtype == offset.dtype == torch.float32
            low, high = (x.double() for x in (kept.amin(0), kept.amax(0)))
            if symmetric:
                exact = torch.maximum(-low, high) / 127
                assert not offset.any()
                assert torch.equal(scale, exact.to(torch.bfloat16).float())  # the type in which the engine holds it
            else:
                low, high = low.clamp(max=0), high.clamp(min=0)
                assert torch.allclose(scale.double(), (high - low) / 255, rtol=2**-7)
                assert torch.equal(offset.double(), (-128 - (low / scale.double()).round()).clamp(-128, 127))


class RoundedCache:
    """A cache of transformers that keeps codes, written out channel by channel."""

    def __init__(self, scales: dict[str, Tensor]) -> None:
        from transformers import DynamicCache

        outer = self

        class Cache(DynamicCache):
            def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
                return super().update(
                    outer.rounded(keys, layer, "k"), outer.rounded(values, layer, "v"), layer, *args, **kwargs
                )

        self.scales = scales
        self.cache = Cache()

    def rounded(self, x: Tensor, layer: int, part: str) -> Tensor:
        scale = self.scales[f"model.layers.{layer}.self_attn.{part}_proj.kv_cache_scale"].view(1, x.shape[1], 1, -1)
        return ((x.float() / scale).round().clamp(-128, 127) * scale).to(x.dtype)


def test_saved_model_computes_what_a_model_with_such_a_cache_computes(
    write: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    quantize(tiny_llama, tmp_path / "out", write("{type: dynamic_cache}"), device="cpu")
    description = json.loads((tmp_path / "out/quant_model_description.json").read_text())
    assert description["kv_cache_type"] == description["kv_quant_type"] == "C8"
    (file,) = (tmp_path / "out").glob("*.safetensors")
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(tiny_llama)
        expected = network(ids, past_key_values=RoundedCache(load_file(file)).cache, use_cache=True).logits
        plain = network(ids).logits
        actual = load_model(tmp_path / "out", tiny_llama, device="cpu")(input_ids=ids, use_cache=False).logits
    assert (expected - plain).abs().max() > 0.02
    assert torch.allclose(actual, expected, atol=(expected - plain).abs().max().item() / 10)
    assert [problem for problem in verify(tmp_path / "out", tiny_llama).problems if problem.fatal] == []


def test_values_that_smoothing_divides_are_measured_behind_it(
    write: Callable[..., Path], tiny_llama: Path, tmp_path: Path, calibration_texts: tuple[str, ...]
) -> None:
    linears = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {}}}"
    smooth = "{type: iter_smooth, enable_subgraph_type: [ov]}"
    results = {}
    for name, entries in (("plain", (linears,)), ("smooth", (smooth, linears))):
        quantize(tiny_llama, tmp_path / name, write(*entries, "{type: dynamic_cache}"), device="cpu")
        (file,) = (tmp_path / name).glob("*.safetensors")
        results[name] = load_file(file)
        text = " ".join(calibration_texts)
        assert evaluate(tmp_path / name, tiny_llama, text, window=64, device="cpu").kl < 0.05
    key, value = (f"model.layers.0.self_attn.{part}_proj" for part in "kv")
    for one in results.values():
        assert one[f"{value}.kv_cache_scale"].isfinite().all()
    assert torch.equal(*(one[f"{key}.kv_cache_scale"] for one in results.values()))
    plain, smooth_ = (
        one[f"{value}.kv_cache_scale"] / one[f"{value}.weight_scale"].view(-1) for one in results.values()
    )
    # Rows of the weight and channels of the cache were divided alike.
    assert torch.allclose(plain, smooth_, rtol=2**-6)


def test_propagated_quantized_the_next_layer_reads_what_comes_out_of_the_cache(
    protocol: Callable[[str], Path], calibration_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    text = YAML.format(entries="    - {type: dynamic_cache}", dataset=calibration_file)
    scales = {}
    for name in ("float", "quantized"):
        quantize(tiny_llama, tmp_path / name, protocol(f"{text}  propagation: {name}\n"), device="cpu")
        (file,) = (tmp_path / name).glob("*.safetensors")
        scales[name] = load_file(file)
    first, last = (f"model.layers.{layer}.self_attn.k_proj.kv_cache_scale" for layer in (0, 2))
    assert torch.equal(scales["float"][first], scales["quantized"][first])
    assert not torch.equal(scales["float"][last], scales["quantized"][last])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("{type: dynamic_cache, include: ['*attention*']}",), "matches no attention"),
        (("{type: dynamic_cache, exclude: ['*']}",), "selects no cache"),
        (("{type: dynamic_cache}", "{type: dynamic_cache}"), "quantizes already"),
        (("{type: dynamic_cache, qconfig: {dtype: fp8_e4m3}}",), "no type for fp8_e4m3 caches"),
        (("{type: dynamic_cache, qconfig: {scope: per_token}}",), "per_channel"),
    ],
)
def test_mistakes_are_refused_by_the_plan(
    entries: tuple[str, ...], message: str, write: Callable[..., Path], tiny_llama: Path
) -> None:
    with pytest.raises(ProtocolError) as error:
        make_plan(tiny_llama, write(*entries), device="cpu")
    assert any(message in str(one) for one in error.value.diagnostics)


def test_selected_attentions_alone_have_scales(write: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out", write(f"{{type: dynamic_cache, include: ['{ATTENTION}']}}"), device="cpu")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    names = {name for name in load_file(file) if "kv_cache" in name}
    assert names == {f"{ATTENTION}.{part}_proj.kv_cache_{what}" for part in "kv" for what in ("scale", "offset")}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channels", [1, 6])
def test_what_comes_out_of_a_cache(symmetric: bool, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator)
    scale = torch.rand(channels, generator=generator) * 0.02 + 0.005
    offset = torch.zeros(channels) if symmetric else torch.arange(channels) * 7 - 20.0
    cache = QuantizedCache(TensorSpec("int8", "per_channel", symmetric), scale, offset.to(torch.int8))
    codes = ((x / scale).double().round() + offset.double()).clamp(-128, 127)
    assert torch.allclose(cache(x).double(), (codes - offset.double()) * scale.double(), rtol=1e-6)


def test_attention_with_such_a_module_of_its_own_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.ModuleDict({"k_cache": nn.Identity()})})
    with pytest.raises(ModelError, match="has a module k_cache of its own"):
        open_places(model, ["attention"])


def test_cache_that_no_linear_of_a_unit_fills_is_refused(tiny_llama: Path, write: Callable[..., Path]) -> None:
    plan = make_plan(tiny_llama, write("{type: dynamic_cache}"), device="cpu")
    with pytest.raises(ModelError, match="is no linear of a unit"):
        find_places([AttentionCache(ATTENTION, f"{ATTENTION}.keys", f"{ATTENTION}.v_proj", 2, 16)], plan.info)
