# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU loads the real model in compressed-tensors, answers, and computes what we simulate.

Integer activations are compared in float32, where the two differ by rounding to codes alone. vLLM's kernel for packed
4-bit weights takes 16 bits, so those are compared in float16, as is float8 on a tiny model. On processors with matrix
tiles vLLM would quantize static activations dynamically, and activations beside 4-bit weights too; the tests keep it
from both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from agreement import divergences, divergences_in_step, simulated, watched
from conftest import INT8, TOKEN, QConfig, Quantize, Read, TinyFactory
from safetensors.torch import load_file, save_file

TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": True, "method": "minmax"}
INT4 = {"scope": "per_group", "dtype": "int4", "symmetric": True, "method": "minmax", "group_size": 64}
INTEGERS = "CompressedTensorsW8A8Int8, CPUInt8ScaledMMLinearKernel"
PACKED = "CompressedTensorsWNA16, CPUWNA16LinearKernel"

SCHEMES: Mapping[str, tuple[QConfig, str, str]] = {
    "W8A8_DYNAMIC": ({"act": TOKEN, "weight": INT8}, "float32", INTEGERS),
    "W8A8": ({"act": TENSOR, "weight": INT8}, "float32", INTEGERS),
    "W8A8 asymmetric": ({"act": {**TENSOR, "symmetric": False}, "weight": INT8}, "float32", INTEGERS),
    "W4A16": ({"weight": INT4}, "float16", PACKED),
    "W4A16 asymmetric": ({"weight": {**INT4, "symmetric": False}}, "float16", PACKED),
}
"""qconfig, dtype of the computation, and the engine's class with its kernel."""
KL = {"float32": 1e-4, "float16": 3e-4}
"""The float model reaches 1e-7 in float32, and 1e-4 in float16."""
ERROR = 5e-3
"""Of a linear's output: a code in a million falls elsewhere."""
LAYERS = 30
CALIBRATION_RECORDS = 6


def left_float(scheme: str) -> tuple[str, ...]:
    """Last parts of the names of linears that stay float: one scale for all tokens does not survive their outliers."""
    return ("down_proj",) if scheme in ("W8A8", "W8A8 asymmetric") else ()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct, bf16, 269 MB."""
    from modelslim.demo_model import write_demo_model

    path = tmp_path_factory.mktemp("smollm2") / "float"
    write_demo_model(path)
    yield path
    shutil.rmtree(path)  # pytest would keep it for the next three sessions


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """A sentence to complete, a question to the assistant, and code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    texts = ("The capital of France is", asked, "def fibonacci(n):\n    ")
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def results(
    smollm2: Path,
    prompts: list[list[int]],
    quantize: Quantize,
    read_with_vllm: Read,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, Any]]:
    """What the engine made of the float model and of every scheme."""
    records = files("modelslim.calibration").joinpath("mix_calib.jsonl").read_text(encoding="utf-8").split("\n")
    dataset = tmp_path_factory.mktemp("calibration") / "records.jsonl"
    dataset.write_text("\n".join(records[:CALIBRATION_RECORDS]) + "\n", encoding="utf-8")
    common = {"prompts": prompts, "new_tokens": 8, "watched": watched(LAYERS)}
    jobs: dict[str, Mapping[str, Any]] = {
        f"FLOAT {dtype}": {**common, "model": smollm2, "dtype": dtype, "watched": []} for dtype in KL
    }
    for scheme, (qconfig, dtype, _) in SCHEMES.items():
        left = [f"*.{last}" for last in left_float(scheme)]
        model = quantize(smollm2, "compressed_tensors_saver", qconfig, dataset=dataset, exclude=left)
        jobs[scheme] = {**common, "model": model, "dtype": dtype}
    yield read_with_vllm(jobs, ascend=False)
    for job in jobs.values():
        if job["model"] != smollm2:
            shutil.rmtree(job["model"])


@pytest.mark.parametrize("dtype", KL)
def test_the_float_model_is_the_same_in_both(dtype: str, results: Mapping[str, Any], smollm2: Path) -> None:
    result = results[f"FLOAT {dtype}"]
    assert "error" not in result, result["error"]
    assert max(divergences(result, simulated(result, smollm2))) < KL[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engine_loads_the_scheme_and_computes_what_we_simulate(
    scheme: str, results: Mapping[str, Any], smollm2: Path
) -> None:
    result = results[scheme]
    assert "error" not in result, result["error"]
    _, dtype, kernel = SCHEMES[scheme]
    for name in result["watched"]:
        left = name.endswith(left_float(scheme))
        assert result["kernels"][name] == ("UnquantizedLinearMethod" if left else kernel), name
    kls, error = divergences_in_step(result, simulated(result, smollm2))
    assert error < ERROR
    assert max(kls) < KL[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engine_knows_the_capital_of_france(scheme: str, results: Mapping[str, Any], smollm2: Path) -> None:
    from transformers import AutoTokenizer

    result = results[scheme]
    assert "error" not in result, result["error"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(result["tokens"][0]).startswith(" Paris")


@pytest.fixture(scope="module")
def tiny_results(tiny_qwen2: TinyFactory, quantize: Quantize, read_with_vllm: Read) -> Mapping[str, Any]:
    """What the engine made of tiny models: in float8, whose kernel is too slow for the real one, and damaged."""
    float8 = {"act": {**TOKEN, "dtype": "fp8_e4m3"}, "weight": {**INT8, "dtype": "fp8_e4m3"}}
    sound = quantize(tiny_qwen2("bfloat16"), "compressed_tensors_saver", float8)
    damaged = quantize(tiny_qwen2("bfloat16"), "compressed_tensors_saver", SCHEMES["W8A8_DYNAMIC"][0])
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    save_file(tensors, file)
    for index in damaged.glob("*.index.json"):
        index.unlink()
    common = {"dtype": "float16", "prompts": [[0, 17, 300, 41, 8, 99, 256, 3, 77, 120]], "watched": watched(2)}
    jobs = {"FP8": {**common, "model": sound}, "damaged": {**common, "model": damaged}}
    return read_with_vllm(jobs, ascend=False)


def test_the_engine_computes_float8_as_we_do(tiny_results: Mapping[str, Any], tiny_qwen2: TinyFactory) -> None:
    result = tiny_results["FP8"]
    assert "error" not in result, result["error"]
    assert {result["kernels"][name] for name in result["watched"]} == {"CompressedTensorsW8A8Fp8"}
    kls, error = divergences_in_step(result, simulated(result, tiny_qwen2("bfloat16")))
    assert error < ERROR
    assert max(kls) < KL["float16"]


def test_the_engine_refuses_a_checkpoint_that_lacks_a_scale(tiny_results: Mapping[str, Any]) -> None:
    """Unless it is asked to check, vLLM computes with what happened to be in memory; so every test here asks."""
    assert "model.layers.1.self_attn.o_proj.weight_scale" in tiny_results["damaged"]["error"]
