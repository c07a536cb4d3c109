# SPDX-License-Identifier: Apache-2.0
"""The integration guide's example, unchanged, on a trained tiny Qwen3-VL-MoE with drawn images."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelslim.api import VlmCalibSample
from modelslim.registry import Registry

MODEL = Path(__file__).parents[1] / "models" / "qwen3-vl-moe-tiny"
GUIDE = Path(__file__).parents[1] / "protocol" / "good" / "guide_vlm.yaml"
TEXT = "Describe this image in detail."
LAYERS, EXPERTS = 4, 8

Program = Callable[..., subprocess.CompletedProcess[str]]


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def result(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's command, in a directory that holds its protocol and six images."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("guide")
    (folder / "calibImages").mkdir()
    shutil.copy(GUIDE, folder / "config.yaml")
    for index in range(6):
        image = Image.new("RGB", (96, 96 + 32 * (index % 2)), (40 * index, 200, 250 - 40 * index))
        ImageDraw.Draw(image).ellipse((10 + 5 * index, 20, 60, 80), fill=(250 - 40 * index, 20, 30 * index))
        image.save(folder / "calibImages" / f"scene{index}.png")
    arguments: dict[str, Any] = {"model_path": MODEL, "save_path": folder / "saved", "device": "cpu"}
    arguments |= {"model_type": "Qwen3-VL-30B-A3B", "config_path": folder / "config.yaml", "trust_remote_code": True}
    done = program("quant", *(str(word) for name, value in arguments.items() for word in (f"--{name}", value)))
    assert (done.returncode, done.stderr.count("quantizing")) == (0, 1 + LAYERS), done.stderr
    yield folder / "saved"
    shutil.rmtree(folder)


def test_schemes_are_those_that_the_guide_states(result: Path) -> None:
    description = json.loads((result / "quant_model_description.json").read_text(encoding="utf-8"))
    weights = {name: scheme for name, scheme in description.items() if name.endswith(".weight")}
    expected = {}
    for layer in range(LAYERS):
        language, vision = f"model.language_model.layers.{layer}", f"model.visual.blocks.{layer}"
        expected |= {f"{language}.self_attn.{part}_proj.weight": "W8A8" for part in "qkvo"}
        expected |= {f"{vision}.{part}.weight": "W8A8" for part in ("attn.qkv", "attn.proj", "mlp.linear_fc1")}
        for expert in range(EXPERTS):
            names = [f"{language}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            expected |= dict.fromkeys(names, "W8A8_DYNAMIC")
    assert {name: scheme for name, scheme in weights.items() if scheme != "FLOAT"} == expected
    floats = {name for name, scheme in weights.items() if scheme == "FLOAT"}
    assert {f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)} <= floats
    assert {f"model.visual.blocks.{layer}.mlp.linear_fc2.weight" for layer in range(LAYERS)} <= floats
    assert {"model.visual.merger.linear_fc1.weight", "model.visual.deepstack_merger_list.1.linear_fc2.weight"} <= floats


def test_weights_mean_those_of_the_source(result: Path) -> None:
    """Codes times scales, and the experts turned from [experts, in, out]."""
    saved, source = read_all(result), read_all(MODEL)
    wanted = {name: tensor for name, tensor in source.items() if ".experts." not in name}
    for name in (name for name in source if ".experts." in name):
        parts = {"down_proj": source[name].mT} if "down_proj" in name else {}
        if not parts:
            gate, up = source[name].mT.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, stacked in parts.items():
            stem = name.rpartition(".")[0]
            wanted |= {f"{stem}.{expert}.{part}.weight": weight for expert, weight in enumerate(stacked)}
    assert {name for name in saved if name.endswith(".weight")} == {name for name in wanted if name.endswith(".weight")}
    for name, weight in wanted.items():
        if saved[name].dtype != torch.int8:
            assert torch.equal(saved[name], weight), name
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.deq_scale" in saved:  # static: that of the weight times that of the input
            scale = saved[f"{stem}.deq_scale"].double() / saved[f"{stem}.input_scale"].double()
        else:
            scale = saved[f"{stem}.weight_scale"].double()
        scale = scale.reshape(-1, 1)
        error = (saved[name].double() * scale - weight.double()).abs()
        assert (error <= 0.51 * scale).all(), name


def test_activation_scales_are_those_of_the_models_own_forward(result: Path) -> None:
    """Minimum and maximum of the inputs, seen by hooks on the model that transformers loads."""
    from transformers import AutoModelForMultimodalLM

    names = ["model.visual.blocks.3.attn.qkv", "model.language_model.layers.2.self_attn.q_proj"]
    model: Any = AutoModelForMultimodalLM.from_pretrained(MODEL)
    ranges: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: ranges[name].append(torch.stack(args[0].aminmax()))
        )
    images = sorted((result.parent / "calibImages").iterdir())
    adapter = Registry.scan().load("models", "Qwen3-VL-30B-A3B")("qwen3_vl_moe", MODEL)
    with torch.no_grad():
        for sample in adapter.handle_dataset([VlmCalibSample(TEXT, str(image)) for image in images], "cpu"):
            model(**sample, use_cache=False)
    saved = read_all(result)
    for name in names:
        seen = torch.stack(ranges[name]).double()
        assert len(seen) == len(images)
        span = seen[:, 1].max().clamp(min=0) - seen[:, 0].min().clamp(max=0)
        torch.testing.assert_close(saved[f"{name}.input_scale"].double().squeeze(), span / 255, rtol=2**-7, atol=0)


def test_shipped_practice_quantizes_every_linear_of_the_language_layers(here: Program, tmp_path: Path) -> None:
    practice = files(Registry.scan().load("practices", "qwen3-vl")) / "qwen3_vl_moe_w8a8_dynamic.yaml"
    done = here(
        "quant", "--device", "cpu", "--model_path", MODEL, "--save_path", tmp_path / "saved", "--config_path", practice
    )
    assert done.returncode == 0, done.stderr
    saved = read_all(tmp_path / "saved")
    quantized = {name for name, tensor in saved.items() if tensor.dtype == torch.int8}
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    experts = [f"mlp.experts.{expert}.{part}_proj" for expert in range(EXPERTS) for part in ("gate", "up", "down")]
    layers = [f"model.language_model.layers.{layer}" for layer in range(LAYERS)]
    assert quantized == {f"{layer}.{name}.weight" for layer in layers for name in [*attention, *experts]}
