# SPDX-License-Identifier: Apache-2.0
"""``quant`` from end to end into ascendv1, with an image, a sound and a text to calibrate on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modelslim.cli.main import main
from modelslim.registry import Registry

Stored = Callable[[str], Path]
STATIC = {"input_scale", "input_offset", "quant_bias", "deq_scale"}
ATTENTION = {
    "qwen2_5_omni": r"layers\.\d\.self_attn\.[qkvo]_proj|visual\.blocks\.\d\.attn\.(q|k|v|proj)",
    "qwen3_omni_moe": r"layers\.\d\.self_attn\.[qkvo]_proj|visual\.blocks\.\d\.attn\.(qkv|proj)",
}
"""Of both towers and of the language layers; the audio tower calls its last linear out_proj."""


def quantizer(scope: str, *include: str) -> dict[str, Any]:
    symmetric = scope == "per_token"
    return {
        "type": "linear_quant",
        "include": list(include),
        "qconfig": {
            "act": {"scope": scope, "dtype": "int8", "symmetric": symmetric, "method": "minmax"},
            "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
        },
    }


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen3_omni_moe"])
def run(
    request: pytest.FixtureRequest, stored: Stored, media: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Model type, the source, and what the command made of it."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(media, folder / "data")
    records = [
        {"image": "a.png", "audio": "a.wav", "text": "what is it"},
        {"image": "b.jpg"},
        {"audio": "b.wav", "text": "and this"},
        {"text": "text alone"},
    ]
    (folder / "data" / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    process = [quantizer("per_tensor", "*attn*")]
    if request.param == "qwen3_omni_moe":
        process.append(quantizer("per_token", "*.experts*"))
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": "data", "default_text": "see"}
    protocol = {"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec}
    (folder / "protocol.yaml").write_text(json.dumps(protocol))
    source = stored(request.param)
    words = ["--model_path", source, "--save_path", folder / "out", "--config_path", folder / "protocol.yaml"]
    assert main(["quant", "--device", "cpu", *map(str, words)]) == 0
    return request.param, source, folder / "out"


def quantized(result: Mapping[str, Tensor]) -> set[str]:
    return {name.removesuffix(".weight") for name, tensor in result.items() if tensor.dtype == torch.int8}


def test_attention_of_towers_and_layers_is_static_and_experts_are_dynamic(run: tuple[str, Path, Path]) -> None:
    model_type, source, out = run
    result = tensors_of(out)
    audio = r"audio_tower\.layers\.\d\.self_attn\.([qkv]_proj|out_proj)"
    static = re.compile(rf"thinker\.(model\.)?({ATTENTION[model_type]}|{audio})\.weight")
    experts = re.compile(r"thinker\.model\.layers\.\d\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight")
    expected = {name for name in tensors_of(source) if static.fullmatch(name)}
    assert {name.partition(".")[2].partition(".")[0] for name in expected} == {"model", "visual", "audio_tower"}
    description = json.loads((out / "quant_model_description.json").read_text())
    assert {name for name, kind in description.items() if kind == "W8A8" and name.endswith(".weight")} == expected
    for name in expected:
        parts = {part for part in STATIC if name.replace("weight", part) in result}
        assert (name, parts) == (name, STATIC)
        scale = result[name.replace("weight", "input_scale")]
        assert scale.isfinite().all() and (scale > 0).all()
    dynamic = {name for name in tensors_of(source) if experts.fullmatch(name)}
    assert len(dynamic) == (2 * 4 * 3 if model_type == "qwen3_omni_moe" else 0)
    assert {name for name, kind in description.items() if kind == "W8A8_DYNAMIC" and name.endswith("weight")} == dynamic
    assert quantized(result) == {name.removesuffix(".weight") for name in expected | dynamic}


def test_codes_stand_for_the_weights_within_half_a_step(run: tuple[str, Path, Path]) -> None:
    _, source, out = run
    result, original = tensors_of(out), tensors_of(source)
    for name in quantized(result):
        weight = original[f"{name}.weight"].double()
        if f"{name}.deq_scale" in result:
            deq = result[f"{name}.deq_scale"]
            deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
            step = (deq.double() / result[f"{name}.input_scale"].double())[:, None]
        else:
            step = result[f"{name}.weight_scale"].double()
        error = (result[f"{name}.weight"].double() * step - weight).abs()
        assert (error <= step * 0.52).all(), name


def test_every_tensor_is_accounted_for_and_all_that_is_no_thinker_is_copied(run: tuple[str, Path, Path]) -> None:
    _, source, out = run
    result, original = tensors_of(out), tensors_of(source)
    assert original.keys() <= result.keys()
    others = [name for name in original if not name.startswith("thinker.")]
    assert len({name.partition(".")[0] for name in others}) == 2
    changed = quantized(result)
    for name, tensor in original.items():
        module, _, kind = name.rpartition(".")
        if module not in changed:
            assert (name, result[name].dtype) == (name, tensor.dtype)
            assert torch.equal(result[name], tensor), name
        elif kind == "bias":  # the format has those of quantized linears in float32
            assert torch.equal(result[name], tensor.float()), name
    added = {name.rpartition(".")[0] for name in result.keys() - original.keys()}
    assert added == changed
    description = json.loads((out / "quant_model_description.json").read_text())
    assert result.keys() <= description.keys()
    assert {description[name] for name in others} == {"FLOAT"}


def test_files_beside_the_weights_come_along(run: tuple[str, Path, Path]) -> None:
    model_type, source, out = run
    config = json.loads((source / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    names = {"preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    names |= {"spk_dict.pt"} if model_type == "qwen2_5_omni" else set()
    for name in names:
        assert (name, digest(out / name)) == (name, digest(source / name))


@pytest.mark.parametrize("model_type", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_shipped_practice_quantizes_every_linear_of_the_language_layers(
    model_type: str, stored: Stored, tmp_path: Path
) -> None:
    source = stored(model_type)
    practice = files(Registry.scan().load("practices", "qwen-omni")) / f"{model_type}_w8a8_dynamic.yaml"
    words = ["--model_path", source, "--save_path", tmp_path / "out", "--config_path", practice]
    assert main(["quant", "--device", "cpu", *map(str, words)]) == 0
    linears = re.compile(r"thinker\.model\.layers\.\d\.(self_attn|mlp|mlp\.experts\.\d)\.(\w+_proj)\.weight")
    expected = {name.removesuffix(".weight") for name in tensors_of(source) if linears.fullmatch(name)}
    assert quantized(tensors_of(tmp_path / "out")) == expected


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()
