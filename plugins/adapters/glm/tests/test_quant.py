# SPDX-License-Identifier: Apache-2.0
"""``quant`` from end to end into ascendv1: every tensor of the source is in the result, the MTP layer quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelslim.cli.main import main
from modelslim.registry import Registry

Stored = Callable[..., Path]
Run = Callable[..., dict[str, Tensor]]


def quantizer(scope: str, *, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
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
        (file,) = (tmp_path / "out").glob("*.safetensors")
        return load_file(file)

    return run


@pytest.mark.parametrize(
    ("model_type", "mtp_layers", "dense"),
    [
        ("glm4_moe", 1, ["*self_attn*", "*shared_experts*", "model.layers.0.mlp*"]),
        ("glm4_moe_lite", 1, ["*self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,o_proj}"]),
        ("glm4v_moe", 1, ["model.visual*", "*self_attn*"]),
    ],
)
def test_static_attention_and_dynamic_experts(
    model_type: str, mtp_layers: int, dense: Sequence[str], quantize: Run, stored: Stored, tmp_path: Path
) -> None:
    source = stored(model_type, mtp_layers)
    result = quantize(
        source,
        quantizer("per_token" if model_type == "glm4v_moe" else "per_tensor", include=dense, exclude=[]),
        quantizer("per_token", include=["*mlp.experts*"], exclude=[]),
    )
    expected = load_file(source / "model.safetensors")
    quantized = {name for name, tensor in result.items() if tensor.dtype == torch.int8}
    for name, tensor in expected.items():
        assert name in result, name
        if name in quantized:
            continue
        if name.removesuffix("bias") + "weight" not in quantized:  # whose bias the format stores in float32
            assert (name, result[name].dtype) == (name, tensor.dtype)
        assert torch.equal(result[name].to(tensor.dtype), tensor), name
    built = model_type != "glm4v_moe"  # the others' MTP layers are copied
    prefix = "model" if built else "model.language_model"
    for layer in (1, 2, 3):
        parts = [f"mlp.experts.{expert}.{part}_proj" for expert in range(4) for part in ("gate", "up", "down")]
        names = {f"{prefix}.layers.{layer}.{part}.weight" for part in (*parts, "self_attn.o_proj")}
        assert names & quantized == (names if layer < 3 or built else set())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not [warning for warning in report["warnings"] if "proven" in warning]  # the plan did prove the forward
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert result.keys() <= description.keys()
    for name in ("eh_proj", "enorm", "shared_head.head", "embed_tokens", "mlp.gate"):
        assert description[f"{prefix}.layers.3.{name}.weight"] == "FLOAT"


@pytest.mark.parametrize("model_type", ["glm4_moe", "glm4v_moe"])
def test_shipped_practice_is_accepted_and_quantizes_all_the_engine_can(
    model_type: str, stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    practice = files(Registry.scan().load("practices", "glm")) / f"{model_type}_w8a8_dynamic.yaml"
    source = stored(model_type, 1)
    words = ["--model_path", source, "--save_path", tmp_path / "out", "--config_path", practice]
    assert main(["quant", "--device", "cpu", *map(str, words)]) == 0, capsys.readouterr().err
    (file,) = (tmp_path / "out").glob("*.safetensors")
    result, expected = load_file(file), load_file(source / "model.safetensors")
    assert expected.keys() <= result.keys()
    matrices = {name for name, tensor in expected.items() if tensor.dim() == 2 and not name.startswith("model.visual")}
    if model_type == "glm4v_moe":
        matrices = {name for name in matrices if not name.startswith("model.language_model.layers.3.")}
    kept = ("eh_proj.weight", "head.weight", "tokens.weight", "mlp.gate.weight")
    quantized = {name for name, tensor in result.items() if tensor.dtype == torch.int8}
    assert quantized == {name for name in matrices if not name.endswith(kept)}


# The processor hands torch tensors to numpy, which torch does not yet do as numpy 2 wants it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pictures_calibrate_the_vision_tower_and_the_language_layers(
    stored: Stored, pictures: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = [
        quantizer("per_tensor", include=["model.visual.blocks*", "*self_attn*"], exclude=[]),
        quantizer("per_token", include=["*mlp.experts*"], exclude=[]),
    ]
    dataset, default_text = str(pictures[0].parent), "describe this picture"
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": dataset, "default_text": default_text}
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(json.dumps({"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec}))
    words = ["--model_path", stored("glm4v_moe", 0), "--save_path", tmp_path / "out", "--config_path", protocol]
    assert main(["quant", "--device", "cpu", *map(str, words)]) == 0, capsys.readouterr().err
    (file,) = (tmp_path / "out").glob("*.safetensors")
    scales = {name: tensor for name, tensor in load_file(file).items() if name.endswith("input_scale")}
    units = {".".join(name.split(".")[:4]) for name in scales}
    towers = {f"model.visual.blocks.{index}" for index in range(2)}
    assert units == towers | {f"model.language_model.layers.{index}" for index in range(3)}
    assert all(torch.isfinite(tensor).all() and (tensor > 0).all() for tensor in scales.values())
