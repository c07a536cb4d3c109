# SPDX-License-Identifier: Apache-2.0
"""``quant`` from end to end into ascendv1: which tensors the result holds, and what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modelslim.cli.main import main
from modelslim.evaluation import evaluate
from modelslim.registry import Registry

Stored = Callable[..., Path]
Run = Callable[..., dict[str, Tensor]]

FLOAT = ["*kv_b_proj", "*eh_proj", "*mlp.gate", "*mlp.experts*"]


def quantizer(scope: str, *, include: list[str], exclude: list[str]) -> dict[str, Any]:
    symmetric = scope == "per_token"
    return {
        "type": "linear_quant",
        "include": include,
        "exclude": exclude,
        "qconfig": {
            "act": {"scope": scope, "dtype": "int8", "symmetric": symmetric, "method": "minmax"},
            "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
        },
    }


@pytest.fixture
def quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives all tensors of the result."""

    def run(source: Path, *process: Mapping[str, Any]) -> dict[str, Tensor]:
        spec = {"process": list(process), "save": [{"type": "ascendv1_saver"}], "dataset": "data.jsonl"}
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("seven 7", "y x")))
        (tmp_path / "protocol.yaml").write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))
        words = ["--model_path", source, "--save_path", tmp_path / "out", "--config_path", tmp_path / "protocol.yaml"]
        code = main(["quant", "--device", "cpu", *map(str, words)])
        assert code == 0, capsys.readouterr().err
        return result_of(tmp_path / "out")

    return run


def result_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_accounted_for(dequantized: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> None:
    """Every tensor of the source is in the result, as it is or quantized, and nothing of float8 is left."""
    for name, tensor in dequantized.items():
        assert name in result, name
        if result[name].dtype != torch.int8:
            assert (name, result[name].dtype) == (name, tensor.dtype)
            assert torch.equal(result[name], tensor), name
    assert not [name for name in result if name.endswith("_scale_inv")]
    assert not [name for name, tensor in result.items() if tensor.dtype == torch.float8_e4m3fn]


def dequantized(path: Path) -> dict[str, Tensor]:
    """The source as bfloat16, by float64; blocks are 16 rows by 24 columns."""
    tensors = result_of(path)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, key = tensors.pop(name), name.removesuffix("_scale_inv")
        rows, columns = tensors[key].shape
        scales = scale.double()[torch.arange(rows) // 16][:, torch.arange(columns) // 24]
        tensors[key] = (tensors[key].double() * scales).float().bfloat16()
    return tensors


def test_float8_source_gives_quantized_linears_and_bfloat16_for_all_else(quantize: Run, stored: Stored) -> None:
    source = stored("deepseek_v3", 1, True)
    result = quantize(source, quantizer("per_token", include=["*"], exclude=FLOAT))
    expected = dequantized(source)
    assert_accounted_for(expected, result)
    quantized = {name for name, tensor in result.items() if tensor.dtype == torch.int8}
    linears = re.compile(r".*(q_a|q_b|kv_a_proj_with_mqa|o|gate|up|down)(_proj)?\.weight")
    wanted = {name for name in expected if linears.fullmatch(name) and ".experts." not in name}
    wanted -= {name for name in wanted if name.endswith("mlp.gate.weight")}
    assert quantized == wanted
    assert {name for name in quantized if name.startswith("model.layers.3.")}
    for name in quantized:
        # Against the float64 dequantization: at most half a step of the row.
        step = result[name.replace(".weight", ".weight_scale")].double()
        error = (result[name].double() * step - expected[name].double()).abs()
        assert (error <= step * 0.51).all(), name


def test_description_and_config_are_those_of_a_float_model_that_was_quantized(
    quantize: Run, stored: Stored, tmp_path: Path
) -> None:
    result = quantize(stored("deepseek_v3", 1, True), quantizer("per_token", include=["*"], exclude=FLOAT))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert result.keys() <= description.keys()
    assert description["model.layers.3.mlp.shared_experts.up_proj.weight"] == "W8A8_DYNAMIC"
    for name in ("eh_proj", "enorm", "shared_head.head", "shared_head.norm", "embed_tokens", "self_attn.kv_b_proj"):
        assert description[f"model.layers.3.{name}.weight"] == "FLOAT"
    assert description["model.layers.1.mlp.gate.e_score_correction_bias"] == "FLOAT"


def test_excluded_mtp_layer_is_written_as_it_was(quantize: Run, stored: Stored) -> None:
    source = stored("deepseek_v3", 1, True)
    result = quantize(source, quantizer("per_token", include=["*"], exclude=[*FLOAT, "*layers.3.*"]))
    expected = dequantized(source)
    assert_accounted_for(expected, result)
    mtp = {name for name in expected if name.startswith("model.layers.3.")}
    assert {name for name in result if name.startswith("model.layers.3.")} == mtp


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_static_activations_of_an_mtp_layer_are_calibrated(
    model_type: str, quantize: Run, stored: Stored, tmp_path: Path
) -> None:
    exclude = [*FLOAT, "*.indexer.weights_proj"] if model_type == "deepseek_v32" else FLOAT
    result = quantize(stored(model_type, 1, True), quantizer("per_tensor", include=["*"], exclude=exclude))
    scales = {name: tensor for name, tensor in result.items() if name.endswith("input_scale")}
    assert {".".join(name.split(".")[:3]) for name in scales} == {f"model.layers.{index}" for index in range(4)}
    assert all(torch.isfinite(tensor).all() and (tensor > 0).all() for tensor in scales.values())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not [warning for warning in report["warnings"] if "proven" in warning]  # the plan did prove the forward


def test_experts_are_quantized_one_by_one(quantize: Run, stored: Stored) -> None:
    source = stored("deepseek_v3", 1, True)
    result = quantize(source, quantizer("per_token", include=["*experts*"], exclude=[]))
    assert_accounted_for(dequantized(source), result)
    experts = {name for name, tensor in result.items() if tensor.dtype == torch.int8 and ".experts." in name}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in (1, 2, 3)
        for expert in range(4)
        for part in ("gate", "up", "down")
    }


def test_plain_bfloat16_source_is_copied_raw_where_it_stays_float(quantize: Run, stored: Stored) -> None:
    source = stored("deepseek_v3", 2, False)
    result = quantize(source, quantizer("per_token", include=["*o_proj"], exclude=[]))
    original = result_of(source)
    assert_accounted_for(original, result)
    assert result.keys() - original.keys() == {
        f"model.layers.{layer}.self_attn.o_proj.{part}"
        for layer in range(5)
        for part in ("weight_scale", "weight_offset")
    }


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_shipped_practice_is_accepted_and_quantizes_all_the_engine_can(
    model_type: str, stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    practice = files(Registry.scan().load("practices", "deepseek")) / f"{model_type}_w8a8_dynamic.yaml"
    source = stored(model_type, 1, True)
    words = ["--model_path", source, "--save_path", tmp_path / "out", "--config_path", practice]
    assert main(["quant", "--device", "cpu", *map(str, words)]) == 0, capsys.readouterr().err
    result = result_of(tmp_path / "out")
    assert_accounted_for(dequantized(source), result)
    matrices = {name for name, tensor in dequantized(source).items() if tensor.dim() == 2}
    kept = ("kv_b_proj.weight", "eh_proj.weight", "weights_proj.weight", "head.weight", "tokens.weight", "gate.weight")
    quantized = {name for name, tensor in result.items() if tensor.dtype == torch.int8}
    assert quantized == {name for name in matrices if not name.endswith(kept)}


def test_result_is_evaluated_against_its_float8_source(quantize: Run, stored: Stored, tmp_path: Path) -> None:
    source = stored("deepseek_v3", 1, True)
    quantize(source, quantizer("per_token", include=["*"], exclude=FLOAT[:3]))
    found = evaluate(tmp_path / "out", source, "some words to read " * 4, window=16, device="cpu")
    assert 0 < found.kl < 0.1
    whole = reference_loss(source, tmp_path)
    assert abs(found.float_perplexity - whole) < 1e-3 * whole


def reference_loss(source: Path, tmp_path: Path) -> float:
    """Perplexity of the float model by transformers, in windows of 16 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "float"
    path.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    save_file(dequantized(source), path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(source)("some words to read " * 4, return_tensors="pt")["input_ids"][0]
    losses = []
    for window in ids.split(16):
        if len(window) > 1:
            with torch.no_grad():
                logits = model(window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("name", ["kv_b_proj", "eh_proj"])
def test_what_the_engine_holds_in_float_is_refused(
    name: str, stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exclude = [pattern for pattern in FLOAT if name not in pattern]
    process = [quantizer("per_token", include=["*"], exclude=exclude)]
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}]}
    (tmp_path / "protocol.yaml").write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))
    words = ["--model_path", stored("deepseek_v3", 1, True), "--config_path", tmp_path / "protocol.yaml"]
    assert main(["plan", "--device", "cpu", *map(str, words)]) == 2
    assert f'add "*.{name}" to exclude' in capsys.readouterr().err
