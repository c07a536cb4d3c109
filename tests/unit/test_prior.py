# SPDX-License-Identifier: Apache-2.0
"""Prior stages: the next stage begins with what the last one made of the model, wherever the run is interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelslim.api import hookimpl
from modelslim.cli.main import main
from modelslim.errors import ProtocolError, UsageError
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.runners.engine import Engine
from modelslim.saved import load_model

SMOOTH = "{type: iter_smooth, alpha: 0.5}"
SHIFT = "{type: iter_smooth, symmetric: false, alpha: 0.5, enable_subgraph_type: [norm-linear]}"
MULTIPLY = "{type: flex_awq_ssz, qconfig: {act: {scope: per_token}, weight: {dtype: int8, method: ssz}}, enable_subgraph_type: [non-fusion]}"
DYNAMIC = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8}}}"
STATIC = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
SHARDED = "{type: ascendv1_saver, part_file_size: 0.00006}"
TEXTS = ("One sentence of another kind, 17 words or so, about a harbour.", "def f(x):\n    return x + 1", "12 34 56")

Protocol = Callable[[str], Path]


def only(entry: str, *patterns: str) -> str:
    return entry.removesuffix("}") + f", include: {json.dumps(list(patterns))}" + "}"


def text(prior: Iterable[tuple[Iterable[str], Path | str | None]], *entries: str, more: str = "") -> str:
    """A protocol: stages as entries and dataset, and the entries of the main one."""
    lines = ["apiversion: modelslim_v1", "spec:"]
    stages = list(prior)
    lines += ["  prior:"] if stages else []
    for process, dataset in stages:
        lines += [f"    - process: [{', '.join(process)}]"]
        lines += [f"      dataset: {dataset}"] if dataset else []
    lines += ["  process:", *(f"    - {entry}" for entry in entries)]
    save = "" if "save:" in more else f"  save: [{SHARDED}]\n"
    return "\n".join(lines) + "\n" + save + more


def run(model: Path, out: Path, config: Path, *observers: Any) -> dict[str, Any]:
    named = [(f"observer{number}", observer) for number, observer in enumerate(observers)]
    return quantize(model, out, config, device="cpu", observers=named)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "report.json"
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same in both."""
    ours, theirs = tensors(one), tensors(other)
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


@pytest.fixture
def other_texts(tmp_path: Path) -> Path:
    """A calibration set of its own for a stage."""
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS), encoding="utf-8")
    return file


def smoothed_by_hand(model: Path, dataset: Path, smooth: str, protocol: Protocol, tmp_path: Path) -> Path:
    """A float checkpoint as smoothing makes it, put together from runs that each leave other layers float."""
    parts: dict[str, Tensor] = {}
    for quantized, kept in ((1, (0,)), (0, (1, 2))):
        quant = only(DYNAMIC, f"*layers.{quantized}.mlp.down_proj")
        out = tmp_path / f"part{quantized}"
        run(model, out, protocol(text([], smooth, quant, more=f"  dataset: {dataset}\n")))
        parts |= {
            name: tensor
            for name, tensor in tensors(out).items()
            if "layers." not in name or any(f"layers.{layer}." in name for layer in kept)
        }
    result = tmp_path / "smoothed"
    shutil.copytree(model, result)
    for file in result.glob("*.safetensors*"):
        file.unlink()
    save_file(parts, result / "model.safetensors", {"format": "pt"})
    return result


# Floats


@pytest.mark.parametrize("smooth", [SMOOTH, "{type: flex_smooth_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"])
def test_a_stage_that_smooths_equals_a_run_on_the_smoothed_model(
    smooth: str, tiny_llama: Path, protocol: Protocol, calibration_file: Path, other_texts: Path, tmp_path: Path
) -> None:
    smoothed = smoothed_by_hand(tiny_llama, other_texts, smooth, protocol, tmp_path)
    assert any("layers" in name for name in differing(tiny_llama, smoothed))
    tail = f"  dataset: {calibration_file}\n"
    run(smoothed, tmp_path / "expected", protocol(text([], STATIC, more=tail)))
    report = run(tiny_llama, tmp_path / "out", protocol(text([([smooth], other_texts)], STATIC, more=tail)))
    assert differing(tmp_path / "out", tmp_path / "expected") == []
    assert not (tmp_path / "out" / "prior").exists()
    (stage,) = report["prior"]
    assert (stage["entry"], stage["dataset"], stage["samples"]) == ("spec.prior[0]", str(other_texts), len(TEXTS))
    assert [unit["unit"] for unit in stage["units"]] == [unit["unit"] for unit in report["units"]]
    assert {len(unit["linears"]) for unit in stage["units"]} == {0}
    # Both data sets were passed, each by its stage.
    assert stage["units"][0]["tokens"] != report["units"][0]["tokens"] != 0
