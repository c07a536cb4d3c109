# SPDX-License-Identifier: Apache-2.0
"""From config.json and tensors back to modules; each damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.api import ModelError, PlannedModel, QuantSpec, SavedLinear, TensorRecord
from modelslim.testing.saver import random_linear
from modelslim_compressed_tensors.saver import CompressedTensorsSaver

SAVER = CompressedTensorsSaver()
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"

Planned = Callable[..., PlannedModel]
Tensors = dict[str, Tensor]
Stored = tuple[Path, Tensors]


def write(path: Path, model: PlannedModel) -> Tensors:
    """What a run leaves of these linears, and one float weight."""
    tensors = {"model.embed_tokens.weight": torch.ones(4, 4)}
    records = [TensorRecord("model.embed_tokens.weight", None, 64)]
    for name, spec in model.specs.items():
        for key, tensor in SAVER.encode(name, random_linear(SAVER, spec, model.dtype), model.dtype):
            tensors[key] = tensor
            records.append(TensorRecord(key, spec, tensor.nbytes))
    config = SAVER.edit_config({"model_type": "llama"}, records, model)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors


def read(path: Path, tensors: Tensors) -> Mapping[str, SavedLinear]:
    return SAVER.read_layout(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


@pytest.fixture
def stored(tmp_path: Path, specs: Mapping[str, QuantSpec], planned: Planned) -> Stored:
    model = planned({DOWN: specs["static-asymmetric"], UP: specs["w4a16-group-asymmetric"]})
    return tmp_path, write(tmp_path, model)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content["quantization_config"])
    file.write_text(json.dumps(content), encoding="utf-8")


def refusal(stored: Stored) -> str:
    with pytest.raises(ModelError) as caught:
        read(*stored)
    assert caught.value.hint
    return caught.value.message


def test_linears_of_all_schemes_are_found(specs: Mapping[str, QuantSpec], planned: Planned, tmp_path: Path) -> None:
    linears = {f"model.layers.{index}.fc": spec for index, spec in enumerate(specs.values())}
    tensors = write(tmp_path, planned(linears))
    found = read(tmp_path, tensors)
    assert {name: saved.spec.scheme for name, saved in found.items()} == {
        name: spec.scheme for name, spec in linears.items()
    }
    for name, saved in found.items():
        module = saved.decode({key: tensors[key] for key in saved.tensors})
        expected = random_linear(SAVER, linears[name], "bfloat16")
        assert torch.equal(module.weight.dequantize(), expected.weight.dequantize())


@pytest.mark.parametrize(
    "tensor",
    [
        *(f"{DOWN}.{part}" for part in ("weight", "weight_scale", "input_scale", "input_zero_point")),
        *(f"{UP}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")),
    ],
)
def test_missing_tensor_is_named(tensor: str, stored: Stored) -> None:
    del stored[1][tensor]
    assert f"there is no {tensor}" in refusal(stored)


@pytest.mark.parametrize("target", ["Linear", f"re:.*{DOWN}$"])
def test_linear_with_nothing_but_its_weight_is_named(
    target: str, specs: Mapping[str, QuantSpec], planned: Planned, tmp_path: Path
) -> None:
    other = DOWN.replace("layers.0", "layers.7")
    tensors = write(tmp_path, planned({DOWN: specs["dynamic"], other: specs["dynamic"]}))
    edit(tmp_path, lambda config: config["config_groups"]["group_0"]["targets"].append(target))
    del tensors[f"{DOWN}.weight_scale"]
    assert f"there is no {DOWN}.weight_scale" in refusal((tmp_path, tensors))


@pytest.mark.parametrize(
    "extra", [f"{DOWN}.weight_zero_point", f"{DOWN}.weight_packed", f"{UP}.input_scale", f"{UP}.weight_global"]
)
def test_tensor_that_no_scheme_has_is_named(extra: str, stored: Stored) -> None:
    stored[1][extra] = torch.ones(128, 1)
    assert f"{extra} is stored" in refusal(stored)


def test_quantized_tensors_of_an_ignored_linear_are_named(stored: Stored) -> None:
    edit(stored[0], lambda config: config["ignore"].append(DOWN))
    assert f"has no group for {DOWN}" in refusal(stored)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (f"{DOWN}.weight", (128,)),
        (f"{DOWN}.weight", (127, 256)),
        (f"{DOWN}.weight_scale", (128, 2)),
        (f"{DOWN}.weight_scale", (128,)),
        (f"{DOWN}.input_scale", ()),
        (f"{UP}.weight_packed", (128, 31)),
        (f"{UP}.weight_zero_point", (128, 8)),
        (f"{UP}.bias", (127,)),
    ],
)
def test_wrong_shape_is_named(tensor: str, shape: tuple[int, ...], stored: Stored) -> None:
    stored[1][tensor] = torch.ones(shape)
    assert tensor in refusal(stored)


def test_stated_shape_that_the_weight_contradicts_is_named(stored: Stored) -> None:
    path, tensors = stored
    saved = read(path, tensors)[UP]
    tensors[f"{UP}.weight_shape"] = torch.tensor([128, 255])
    with pytest.raises(ModelError, match=rf"{UP}.weight_shape says \[128, 255\]"):
        saved.decode(tensors)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_only_its_own_config_is_recognized(content: str, tmp_path: Path) -> None:
    assert not SAVER.recognizes(tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    if content == "{":
        with pytest.raises(ModelError, match=r"config\.json"):
            SAVER.recognizes(tmp_path)
    else:
        assert not SAVER.recognizes(tmp_path)
