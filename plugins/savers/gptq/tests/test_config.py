# SPDX-License-Identifier: Apache-2.0
"""quantization_config, and the names by which readers find what is quantized and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from modelslim.api import PlannedModel, QuantSpec, TensorRecord
from modelslim_gptq.saver import GptqSaver

Planned = Callable[..., PlannedModel]
Scheme = Callable[..., QuantSpec]
LAYER = "model.layers.0"


def section(model: PlannedModel, config: dict[str, Any] | None = None) -> dict[str, Any]:
    records = [TensorRecord("model.norm.weight", None, 1)]
    records += [TensorRecord(f"{name}.qweight", spec, 1) for name, spec in model.specs.items()]
    edited = GptqSaver().edit_config(config or {}, records, model)
    return dict(edited["quantization_config"])


def test_section_says_what_readers_ask(planned: Planned, scheme: Scheme) -> None:
    names = (f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.o_proj")
    spec = scheme(4, 128)
    assert section(planned({names[0]: spec, names[1]: spec, f"{LAYER}.mlp.down_proj": None, "lm_head": None})) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "dynamic": {rf"-:^{re.escape(LAYER)}\.mlp\.down_proj$": {}},
        "modules_in_block_to_quantize": [[*names]],
    }


def test_asymmetric_weights_are_of_version_2(planned: Planned, scheme: Scheme) -> None:
    found = section(planned({f"{LAYER}.mlp.up_proj": scheme(8, symmetric=False)}))
    assert (found["bits"], found["group_size"], found["sym"]) == (8, -1, False)
    assert found["checkpoint_format"] == "gptq_v2"


def test_quantized_head_is_told(planned: Planned, scheme: Scheme) -> None:
    found = section(planned({f"{LAYER}.mlp.up_proj": scheme(4), "lm_head": scheme(4)}))
    assert found["lm_head"] is True
    assert found["modules_in_block_to_quantize"] == [[f"{LAYER}.mlp.up_proj", "lm_head"]]
    # A reader that begins at the blocks would not come to the head.
    assert found["block_name_to_quantize"] == ""


def test_experts_are_named_once_a_layer_and_only_where_they_stay_float(planned: Planned, scheme: Scheme) -> None:
    experts = {f"{LAYER}.mlp.experts.{number}.up_proj": scheme(4) for number in range(3)}
    more = {f"model.layers.1.mlp.experts.{number}.up_proj": None for number in range(3)}
    found = section(planned({**experts, **more, f"{LAYER}.self_attn.o_proj": scheme(4)}))
    assert found["modules_in_block_to_quantize"] == [[f"{LAYER}.self_attn.o_proj"]]
    (pattern,) = found["dynamic"]
    assert pattern.startswith("-:")
    assert re.match(pattern[2:], "model.layers.1.mlp.experts")
    assert re.match(pattern[2:], "model.layers.1.mlp.experts.2.up_proj")
    assert not re.match(pattern[2:], "model.layers.1.mlp.experts_norm")
    assert not re.match(pattern[2:], f"{LAYER}.mlp.experts")


def test_section_of_the_source_is_replaced_at_every_depth(planned: Planned, scheme: Scheme) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}, "text_config": {"quantization_config": {}, "layers": 2}}
    records = [TensorRecord("a.qweight", scheme(4), 1)]
    edited = GptqSaver().edit_config(config, records, planned({"a": scheme(4)}))
    assert edited["quantization_config"]["quant_method"] == "gptq"
    assert edited["text_config"] == {"layers": 2}


def test_model_in_which_nothing_was_quantized_has_no_section(planned: Planned) -> None:
    assert GptqSaver().edit_config({"a": 1}, [TensorRecord("n.weight", None, 1)], planned({})) == {"a": 1}


@pytest.mark.parametrize(("config", "limit"), [({}, 4 << 30), ({"part_file_size": 0}, 0)])
def test_part_file_size_is_in_gib_and_zero_means_one_file(config: dict[str, Any], limit: int) -> None:
    assert GptqSaver.from_config({"type": "gptq_saver", **config}).max_shard_bytes == limit
    assert GptqSaver().finish([], PlannedModel({}, "bfloat16", {}, {}, frozenset())) == {}
