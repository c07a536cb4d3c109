# SPDX-License-Identifier: Apache-2.0
"""Linears whose input is multiplied at run time: their names, what comes back, and what is said about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelslim.api import ModelError, PlannedModel, QuantizedLinear, QuantSpec, TensorRecord
from modelslim.testing.saver import planned_problems
from modelslim_ascendv1.saver import AscendV1Saver

NAME = "model.layers.0.mlp.down_proj"
DESCRIPTION = "quant_model_description.json"
MULTIPLIER = torch.linspace(0.1, 3, 64)

Linear = Callable[..., QuantizedLinear]


def store(path: Path, module: QuantizedLinear, name: str = NAME) -> dict[str, Tensor]:
    """Encode one linear; the description goes to the directory."""
    saver = AscendV1Saver()
    tensors = dict(saver.encode(name, module, "bfloat16"))
    records = [TensorRecord(key, module.spec, tensor.nbytes) for key, tensor in tensors.items()]
    for file, content in saver.finish(records, PlannedModel({}, "bfloat16", {}, {}, frozenset())).items():
        (path / file).write_text(json.dumps(content), encoding="utf-8")
    return tensors


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_names_and_types(linear: Linear, spec: QuantSpec, tmp_path: Path) -> None:
    """``P.div.mul_scale`` is FLOAT, and what a plain linear calls ``P.x`` is ``P.linear.x``."""
    plain = store(tmp_path, linear(spec))
    types = json.loads((tmp_path / DESCRIPTION).read_text())
    module = linear(spec)
    module.input_multiplier = MULTIPLIER
    tensors = store(tmp_path, module)
    multiplied = json.loads((tmp_path / DESCRIPTION).read_text())
    stored = tensors.pop(f"{NAME}.div.mul_scale")
    assert (stored.dtype, stored.shape) == (torch.float32, (64,)) and torch.equal(stored, MULTIPLIER)
    assert multiplied.pop(f"{NAME}.div.mul_scale") == "FLOAT"
    assert multiplied == {key.replace(NAME, f"{NAME}.linear"): value for key, value in types.items()}
    assert tensors.keys() == {key.replace(NAME, f"{NAME}.linear") for key in plain}
    for key, tensor in plain.items():
        other = tensors[key.replace(NAME, f"{NAME}.linear")]
        assert other.dtype == tensor.dtype and torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), key


def test_linear_that_is_called_linear_is_none_of_them(
    linear: Linear, specs: Mapping[str, QuantSpec], tmp_path: Path
) -> None:
    tensors = store(tmp_path, linear(specs["dynamic"]), "model.proj.linear")
    assert AscendV1Saver.read_layout(tmp_path, shapes(tensors)).keys() == {"model.proj.linear"}


def test_multiplier_of_nothing_is_refused(linear: Linear, specs: Mapping[str, QuantSpec], tmp_path: Path) -> None:
    tensors = {**store(tmp_path, linear(specs["dynamic"])), "model.norm.div.mul_scale": MULTIPLIER}
    types = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**types, "model.norm.div.mul_scale": "FLOAT"}))
    with pytest.raises(ModelError, match=r"model\.norm\.div\.mul_scale is described as FLOAT and belongs to no linear"):
        AscendV1Saver.read_layout(tmp_path, shapes(tensors))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda size, type_: ((63,), type_), r"mul_scale has shape \(63,\)"),
        (lambda size, type_: (size, "W8A8_DYNAMIC"), "mul_scale is described as W8A8_DYNAMIC"),
    ],
)
def test_damaged_multiplier_is_named(
    damage: Callable[..., tuple[tuple[int, ...], str]],
    message: str,
    linear: Linear,
    specs: Mapping[str, QuantSpec],
    tmp_path: Path,
) -> None:
    module = linear(specs["dynamic"])
    module.input_multiplier = MULTIPLIER
    tensors = store(tmp_path, module)
    key, types = f"{NAME}.div.mul_scale", json.loads((tmp_path / DESCRIPTION).read_text())
    size, types[key] = damage((64,), "FLOAT")
    (tmp_path / DESCRIPTION).write_text(json.dumps(types))
    with pytest.raises(ModelError, match=message):
        AscendV1Saver.read_layout(tmp_path, {**shapes(tensors), key: size})


def test_it_is_said_that_one_engine_does_not_load_them(
    specs: Mapping[str, QuantSpec], planned: Callable[..., PlannedModel]
) -> None:
    model = planned({NAME: specs["dynamic"]})
    saver = AscendV1Saver()
    assert planned_problems(saver, "ascendv1_saver", model) == []
    linears = {name: replace(info, has_multiplier=True) for name, info in model.linears.items()}
    (problem,) = planned_problems(saver, "ascendv1_saver", replace(model, linears=linears))
    assert not problem.fatal and problem.linear == NAME
    assert problem.message.startswith("vLLM-Ascend has no linear whose input is multiplied first")
    assert "non-fusion" in problem.hint
