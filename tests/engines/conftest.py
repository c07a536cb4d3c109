# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the engines, and one process of the engine that reads all that a test module made.

It runs in an environment of its own, whose Python the variable ENGINE_PYTHON names: the engine pins other versions than
the project is tested with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file belong to no package

Read = Callable[..., Mapping[str, Any]]
TinyFactory = Callable[[str], Path]
Quantize = Callable[..., Path]
QConfig = Mapping[str, Any]

SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Of the tiny models."""

INT8 = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
INT4 = {"scope": "per_group", "dtype": "int4", "symmetric": True, "method": "minmax", "group_size": 64}
TOKEN = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
TENSOR = {"scope": "per_tensor", "dtype": "int8", "symmetric": True, "method": "minmax"}


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No progress bars and no reports of loading."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> TinyFactory:
    """``tiny_qwen2(dtype)`` -> Path of a random qwen2 of two layers, whose q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made: dict[str, Path] = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("qwen2")
            _write(Qwen2ForCausalLM(Qwen2Config(**SIZES, dtype=dtype)), dtype, made[dtype])
            tiny_tokenizer.save_pretrained(made[dtype])
        return made[dtype]

    return make


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random qwen3_moe of two layers with four experts each, bf16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    path = tmp_path_factory.mktemp("moe")
    _write(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, dtype="bfloat16")), "bfloat16", path)
    tiny_tokenizer.save_pretrained(path)
    return path


def _write(model: Any, dtype: str, path: Path) -> None:
    """Save a model with random weights, the same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        # Norms of ones and biases of zeros would hide a mix-up.
        mean, deviation = (1.0, 0.2) if "norm" in name else (0.0, 0.2 if name.endswith(".bias") else 0.1)
        torch.nn.init.normal_(parameter, mean, deviation, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(path)


@pytest.fixture(scope="session")
def quantize(tmp_path_factory: pytest.TempPathFactory, calibration_file: Path) -> Quantize:
    """``quantize(model, saver, qconfig, experts=..., dataset=..., exclude=...)`` -> Path of the result.

    Every linear of the layers becomes ``qconfig``, and those of experts ``experts`` where it is given.
    """
    from modelslim.run import quantize as run

    def make(
        model: Path,
        saver: str,
        qconfig: QConfig,
        *,
        experts: QConfig | None = None,
        dataset: Path = calibration_file,
        exclude: Sequence[str] = (),
    ) -> Path:
        place = tmp_path_factory.mktemp("quantized")
        left = [*exclude, *(["*experts*"] if experts else [])]
        entry = {"type": "linear_quant", "qconfig": dict(qconfig), "include": ["*"]}
        process = [{**entry, "exclude": left} if left else entry]
        if experts:
            process.append({"type": "linear_quant", "qconfig": dict(experts), "include": ["*experts*"]})
        spec = {"process": process, "save": [{"type": saver}], "dataset": str(dataset)}
        protocol = place / "protocol.yaml"
        protocol.write_text(yaml.safe_dump({"apiversion": "modelslim_v1", "spec": spec}), encoding="utf-8")
        run(model, place / "result", protocol, device="cpu")
        return place / "result"

    return make


@pytest.fixture(scope="session")
def read_with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """``read_with_vllm({name: job})`` -> result by name; a job lacks what is the same for all, see ``vllm_run``."""

    def read(jobs: Mapping[str, Mapping[str, Any]], *, ascend: bool) -> Mapping[str, Any]:
        place = tmp_path_factory.mktemp("vllm")
        full: dict[str, dict[str, Any]] = {}
        for index, (name, job) in enumerate(jobs.items()):
            common = {
                "stored": False,
                "portable": True,
                "tracked": not ascend,
                "watched": [],
                "kept": [],
                "prompts": [],
                "new_tokens": 4,
                "ascend": ascend,
            }
            files = {"result": str(place / f"{index}.json"), "tensors": str(place / f"{index}.safetensors")}
            full[name] = {**common, **files, **job, "model": str(job["model"])}
        (place / "jobs.json").write_text(json.dumps(list(full.values())), encoding="utf-8")
        log = run_in_engine(Path(__file__).with_name("vllm_run.py"), place / "jobs.json")
        results = {}
        for name, job in full.items():
            assert Path(job["result"]).exists(), log[-4000:]
            results[name] = {**job, **json.loads(Path(job["result"]).read_text(encoding="utf-8"))}
        return results

    return read


def _interpreter() -> str:
    """That of the environment which holds vLLM; it pins versions of its own."""
    if "ENGINE_PYTHON" not in os.environ:
        pytest.fail(
            "ENGINE_PYTHON must name the Python of an environment with vLLM; the tox environment engines sets it"
        )
    return os.environ["ENGINE_PYTHON"]


def run_in_engine(program: Path, jobs: Path) -> str:
    """Run a program to its end, and return what it said; more threads than one only wait on tensors this small."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [_interpreter(), str(program), str(jobs)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=3000)
    return done.stdout + done.stderr
