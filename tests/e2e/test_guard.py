# SPDX-License-Identifier: Apache-2.0
"""A hand-written adapter whose forward is not the model's own is refused by plan and quant, when the run calibrates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., subprocess.CompletedProcess[str]]
WriteProtocol = Callable[[str], Path]

ADAPTER = '''\
from modelslim.api import ProcessRequest, hookimpl
from modelslim_transformers.adapter import TransformersAdapter


class Acme:
    """Takes all from the generic adapter but its forward, and has no make_tiny_checkpoint."""

    init_model = TransformersAdapter.init_model
    handle_dataset = TransformersAdapter.handle_dataset
    generate_model_visit = TransformersAdapter.generate_model_visit
    get_weight_sources = TransformersAdapter.get_weight_sources

    def __init__(self, *arguments):
        self._generic = TransformersAdapter(*arguments)

    def __getattr__(self, name):
        return getattr(self._generic, name)

    @hookimpl
    def generate_model_forward(self, model, inputs):
        own = self._generic.generate_model_forward(model, inputs)
        request = next(own)
        first = request.kwargs
        try:
            while True:
                output = yield ProcessRequest(request.name, request.module, request.args, first)
                request = own.send(output)
        except StopIteration as end:
            return end.value
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the adapter, registered for gemma3_text and for llama."""
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme_adapter.py").write_text(ADAPTER, encoding="utf-8")
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    lines = ["[modelslim.adapters]", *(f"{name} = acme_adapter:Acme" for name in ("gemma3_text", "llama"))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A gemma3_text whose last two layers see all tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, sliding_window=4, layer_types=["sliding_attention"] * 4 + ["full_attention"] * 2,
        dtype="bfloat16",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("gemma")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("command", ["plan", "quant"])
def test_wrong_forward_is_refused_when_the_run_calibrates(
    command: str,
    program: Program,
    gemma: Path,
    installed: Path,
    protocol: WriteProtocol,
    w8a8_static: str,
    tmp_path: Path,
) -> None:
    words: list[str | Path] = ["--device", "cpu", "--model_path", gemma, "--config_path", protocol(w8a8_static)]
    words += ["--save_path", tmp_path / "out"] if command == "quant" else []
    done = program(command, *words, "--json", PYTHONPATH=str(installed))
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "CapabilityError"
    assert "the adapter 'gemma3_text', unit by unit, is not the model's own" in error["message"]
    assert "first unit that differs is model.layers.4: " in error["message"]
    assert "attention_mask" in error["message"]
    assert "generate_model_forward" in error["hint"]
    assert not (tmp_path / "out").exists()


def test_run_that_does_not_calibrate_passes_nothing_through_the_forward(
    program: Program, gemma: Path, installed: Path, protocol: WriteProtocol, w8a8_dynamic: str
) -> None:
    words = ["--device", "cpu", "--model_path", gemma, "--config_path", protocol(w8a8_dynamic), "--json"]
    done = program("plan", *words, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == "gemma3_text"


def test_right_forward_without_the_hook_is_proven_by_the_generic_adapters_tiny_model(
    program: Program, tiny_llama: Path, installed: Path, protocol: WriteProtocol, w8a8_static: str
) -> None:
    words = ["--device", "cpu", "--model_path", tiny_llama, "--config_path", protocol(w8a8_static), "--json"]
    done = program("plan", *words, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(done.stdout)
    assert (plan["adapter"], plan["warnings"], done.stderr) == ("llama", [], "")
