# SPDX-License-Identifier: Apache-2.0
"""quantization_config, and the names by which readers find what is not quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from modelslim.api import PlannedModel, QuantSpec, TensorRecord
from modelslim_awq.saver import AwqSaver

Planned = Callable[..., PlannedModel]
Scheme = Callable[..., QuantSpec]
LAYER = "model.layers.0"


def section(model: PlannedModel) -> dict[str, Any]:
    records = [TensorRecord("model.norm.weight", None, 1)]
    records += [TensorRecord(f"{name}.qweight", spec, 1) for name, spec in model.specs.items()]
    return dict(AwqSaver().edit_config({}, records, model)["quantization_config"])


def test_section_says_what_readers_ask(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.up_proj": scheme(4, 128), f"{LAYER}.mlp.down_proj": None, "lm_head": None})
    assert section(model) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", f"{LAYER}.mlp.down_proj"],
    }


def test_whole_rows_have_the_group_size_of_minus_one(planned: Planned, scheme: Scheme) -> None:
    assert section(planned({f"{LAYER}.mlp.up_proj": scheme(4)}))["group_size"] == -1


def test_routers_and_what_the_adapter_leaves_out_are_named_too(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.up_proj": scheme(4)}, matrices=frozenset({"mtp.fc", f"{LAYER}.mlp.gate"}))
    assert section(model)["modules_to_not_convert"] == [f"{LAYER}.mlp.gate", "mtp.fc"]


def test_linear_that_is_stored_under_another_name_has_both(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.up_proj": scheme(4), "visual.fc1": None})
    linears = {**model.linears, "visual.fc1": replace(model.linears["visual.fc1"], name="model.visual.fc1")}
    names = section(replace(model, linears={one.name: one for one in linears.values()}))["modules_to_not_convert"]
    assert names == ["model.visual.fc1", "visual.fc1"]


def test_float_experts_are_named_once_a_layer(planned: Planned, scheme: Scheme) -> None:
    experts = {f"{LAYER}.mlp.experts.{number}.up_proj": None for number in range(3)}
    found = section(planned({**experts, f"{LAYER}.self_attn.o_proj": scheme(4)}))
    assert found["modules_to_not_convert"] == [f"{LAYER}.mlp.experts"]


def test_section_of_the_source_is_replaced_at_every_depth(planned: Planned, scheme: Scheme) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}, "text_config": {"quantization_config": {}, "layers": 2}}
    records = [TensorRecord("a.qweight", scheme(4), 1)]
    edited = AwqSaver().edit_config(config, records, planned({"a": scheme(4)}))
    assert edited["quantization_config"]["quant_method"] == "awq"
    assert edited["text_config"] == {"layers": 2}


def test_model_in_which_nothing_was_quantized_has_no_section(planned: Planned) -> None:
    assert AwqSaver().edit_config({"a": 1}, [TensorRecord("n.weight", None, 1)], planned({})) == {"a": 1}


@pytest.mark.parametrize(("config", "limit"), [({}, 4 << 30), ({"part_file_size": 0}, 0)])
def test_part_file_size_is_in_gib_and_zero_means_one_file(config: dict[str, Any], limit: int) -> None:
    assert AwqSaver.from_config({"type": "awq_saver", **config}).max_shard_bytes == limit
    assert AwqSaver().finish([], PlannedModel({}, "bfloat16", {}, {}, frozenset())) == {}
