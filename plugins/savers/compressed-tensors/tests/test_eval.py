# SPDX-License-Identifier: Apache-2.0
"""``eval`` on written checkpoints, whose config.json no adapter would open: what transformers computes, or a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelslim.cli.main import main
from modelslim.errors import ModelError
from modelslim.evaluation import evaluate
from modelslim.run import quantize
from modelslim.saved import load_model

Source = Callable[..., Path]
Result = Callable[..., Path]
Process = Callable[..., dict[str, Any]]

TEXT = "by morning seven boats were under the river and nine oars in the fields " * 3


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_kl_and_perplexity_are_those_of_transformers(
    kind: str, source: Source, result: Result, process: Process
) -> None:
    model = source(kind)
    path = result(model, process("w4a16-group"))
    found = evaluate(path, model, TEXT, window=64, device="cpu")
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]])
    logs, losses = [], []
    for module in (AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(path)):
        parts = [part for part in ids.split(64, 1) if part.shape[1] > 1]
        with torch.no_grad():
            log = [module(part).logits[0].double().log_softmax(-1) for part in parts]
        logs.append(torch.cat(log))
        nll = [-one[:-1].gather(1, part[0, 1:, None]) for one, part in zip(log, parts, strict=True)]
        losses.append(float(torch.cat(nll).mean().exp()))
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert kl > 1e-3
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert [found.float_perplexity, found.quantized_perplexity] == pytest.approx(losses, rel=1e-4)


def test_the_command_reads_what_the_command_wrote(
    source: Source, result: Result, process: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = result(source(), process("dynamic"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = [
        "eval",
        "--json",
        "--device",
        "cpu",
        str(path),
        "--float",
        str(source()),
        "--text",
        str(tmp_path / "text.txt"),
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert 0 < json.loads(capsys.readouterr().out)["kl"] < 0.1


def test_missing_scale_is_named_and_not_read_as_nan(
    source: Source, result: Result, process: Process, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(result(source(), process("dynamic"), part_file_size=0), damaged)
    tensors = load_file(damaged / "model.safetensors")
    lost = "model.layers.1.self_attn.k_proj.weight_scale"
    del tensors[lost]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(ModelError, match=lost.replace(".", r"\.")):
        evaluate(damaged, source(), TEXT, device="cpu")
    with pytest.raises(ModelError, match=lost.replace(".", r"\.")):
        load_model(damaged, source(), device="cpu")


def test_checkpoint_is_left_as_it_is(source: Source, result: Result, process: Process) -> None:
    path = result(source(), process("static"))
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    load_model(path, source(), device="cpu")
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_quantized_checkpoint_is_no_source(source: Source, result: Result, process: Process, tmp_path: Path) -> None:
    path = result(source(), process("w8a16"))
    spec = {"process": [process("w8a16")], "save": [{"type": "compressed_tensors_saver"}]}
    (tmp_path / "protocol.yaml").write_text(json.dumps({"apiversion": "modelslim_v1", "spec": spec}))
    with pytest.raises(ModelError, match="quantized already"):
        quantize(path, tmp_path / "out", tmp_path / "protocol.yaml", device="cpu")
    assert not (tmp_path / "out").exists()
