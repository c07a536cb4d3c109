# SPDX-License-Identifier: Apache-2.0
"""Names of files, the description, the tensors read back by a decoder of the test's own, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelslim.api import LinearInfo, ModelError, PlannedModel, QuantSpec, SaveError, TensorRecord, TensorSpec
from modelslim.testing.saver import random_linear
from modelslim_mindie.saver import MindieSaver

Specs = Mapping[str, QuantSpec]
Planned = Callable[..., PlannedModel]
NAME = "blocks.0.ffn.2"


def describe(saver: MindieSaver, model: PlannedModel, records: list[TensorRecord]) -> tuple[str, dict[str, Any]]:
    ((file, description),) = saver.finish(records, model).items()
    return file, dict(description)


@pytest.mark.parametrize(
    ("types", "suffix"),
    [
        ([], ""),
        (["W8A8"], "_w8a8"),
        (["W8A8_DYNAMIC"], "_w8a8_dynamic"),
        (["W8A8", "W8A8_DYNAMIC"], "_w8a8"),
        (["W8A8_MXFP8", "W8A8"], "_w8a8_mxfp8"),
        (["W4A4_MXFP4", "W8A8_MXFP8"], "_w4a4_mxfp4"),
    ],
)
def test_files_are_named_after_the_strongest_type(
    types: list[str], suffix: str, specs: Specs, planned: Planned
) -> None:
    model = planned({type_: specs[type_] for type_ in types} | {"norm": None})
    records = [TensorRecord(f"{type_}.weight", specs[type_], 1) for type_ in types]
    whole, parts = MindieSaver(0), MindieSaver(4)
    assert whole.weights_name(model) == f"quant_model_weight{suffix}"
    assert parts.weights_name(model) == "quant_model_weight"
    for saver in (whole, parts):
        file, description = describe(saver, model, records)
        assert file == f"quant_model_description{suffix}.json"
        assert description["model_quant_type"] == (suffix.lstrip("_").upper() or "FLOAT")


def test_description_has_a_type_for_every_tensor_and_no_other_keys(specs: Specs, planned: Planned) -> None:
    saver = MindieSaver()
    module = random_linear(saver, specs["W8A8"], "float16")
    module.input_multiplier = torch.ones(module.in_features)
    tensors = saver.encode(NAME, module, "float16")
    records = [TensorRecord("norm.weight", None, 1)]
    records += [TensorRecord(key, module.spec, tensor.nbytes) for key, tensor in tensors]
    _, description = describe(saver, planned({NAME: module.spec}), records)
    assert description == {
        "model_quant_type": "W8A8",
        "norm.weight": "FLOAT",
        f"{NAME}.div.mul_scale": "FLOAT",
        f"{NAME}.linear.weight": "W8A8",
        f"{NAME}.linear.quant_bias": "W8A8",
        f"{NAME}.linear.input_scale": "W8A8",
        f"{NAME}.linear.input_offset": "W8A8",
        f"{NAME}.linear.deq_scale": "W8A8",
        f"{NAME}.linear.bias": "FLOAT",
    }


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float16", "float32"])
def test_static_tensors_give_what_the_linear_gives(model_dtype: str, specs: Specs) -> None:
    saver = MindieSaver()
    module = random_linear(saver, specs["W8A8"], model_dtype)
    parts = {key.removeprefix(f"{NAME}."): tensor for key, tensor in saver.encode(NAME, module, model_dtype)}
    assert parts["deq_scale"].dtype == torch.float32
    wide = {key: tensor.to(torch.float64).numpy() for key, tensor in parts.items()}
    x = np.random.default_rng(0).normal(size=(5, module.in_features))
    codes = np.rint(x / wide["input_scale"] + wide["input_offset"]).clip(-128, 127)
    result = (codes @ wide["weight"].T + wide["quant_bias"]) * wide["deq_scale"]
    # quant_bias rounds the bias to a whole number of deq_scale.
    error = np.abs(result - module(torch.from_numpy(x).float()).numpy())
    assert (error <= 0.51 * wide["deq_scale"] + 1e-5).all()


@pytest.mark.parametrize("type_", ["W8A8_DYNAMIC", "W8A8_MXFP8", "W4A4_MXFP4"])
def test_dynamic_tensors_give_the_weight(type_: str, specs: Specs) -> None:
    saver = MindieSaver()
    module = random_linear(saver, specs[type_], "bfloat16", bias=False)
    parts = {key.removeprefix(f"{NAME}."): tensor for key, tensor in saver.encode(NAME, module, "bfloat16")}
    if type_ == "W8A8_DYNAMIC":
        assert not parts["weight_offset"].any()
        scale, codes = parts["weight_scale"].double(), parts["weight"].double()
    elif type_ == "W8A8_MXFP8":
        scale, codes = 2.0 ** (parts["weight_scale"].double() - 127), parts["weight"].double()
    else:
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        nibbles = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), -1).flatten(1).long()
        scale, codes = 2.0 ** (parts["weight_scale"].double() - 127), torch.cat((steps, -steps))[nibbles]
    weight = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    assert torch.equal(weight.float(), module.weight.dequantize())


def test_section_of_the_source_is_removed(planned: Planned) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}, "dim": 4}
    assert MindieSaver().edit_config(config, [], planned({})) == {"dim": 4}


def test_other_types_are_refused_with_a_word_for_the_other_format(planned: Planned) -> None:
    spec = QuantSpec(TensorSpec("int8", "per_channel"))
    (problem,) = MindieSaver().check(planned({NAME: spec}))
    assert "W8A16" in problem.message
    assert "ascendv1_saver" in problem.hint
    with pytest.raises(SaveError, match=r"no type for W8A16"):
        MindieSaver().encode(NAME, random_linear(MindieSaver(), spec, "bfloat16"), "bfloat16")
    with pytest.raises(SaveError, match=r"no type for W8A16"):
        MindieSaver().encoded_sizes(LinearInfo(NAME, NAME, "", 64, 64, False, "bfloat16"), spec, "bfloat16")


def test_tied_head_is_refused(specs: Specs, planned: Planned) -> None:
    (problem,) = MindieSaver().check(planned({"lm_head": specs["W8A8"]}, {"tie_word_embeddings": True}))
    assert problem.linear == "lm_head"


def test_two_descriptions_are_refused(tmp_path: Path) -> None:
    assert not MindieSaver.recognizes(tmp_path)
    (tmp_path / "quant_model_description.json").write_text("{}", encoding="utf-8")
    assert not MindieSaver.recognizes(tmp_path)  # ascendv1's
    for type_ in ("w8a8", "w8a8_dynamic"):
        (tmp_path / f"quant_model_description_{type_}.json").write_text("{}", encoding="utf-8")
    assert MindieSaver.recognizes(tmp_path)
    with pytest.raises(ModelError, match=r"holds 2 description files: \S+w8a8_dynamic.json, \S+w8a8.json"):
        MindieSaver.read_layout(tmp_path, {})


def test_description_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "quant_model_description_w8a8.json"
    file.write_text(json.dumps({"model_quant_type": "W8A8", f"{NAME}.weight": "W8A8"}), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{file.name} describes {NAME}.weight that is in no weight file"):
        MindieSaver.read_layout(tmp_path, {})


@pytest.mark.parametrize(("config", "limit"), [({}, 4 << 30), ({"part_file_size": 0}, 0)])
def test_part_file_size_is_in_gib_and_zero_means_one_file(config: dict[str, Any], limit: int) -> None:
    assert MindieSaver.from_config({"type": "mindie_format_saver", **config}).max_shard_bytes == limit
