# SPDX-License-Identifier: Apache-2.0
"""What the saver says of itself, the description file and config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from modelslim.api import PlannedModel, QuantizedLinear, QuantSpec, TensorRecord, TensorSpec
from modelslim_ascendv1.saver import AscendV1Saver

EMPTY = PlannedModel({}, "bfloat16", {}, {}, frozenset())


def describe(records: list[TensorRecord]) -> dict[str, Any]:
    files = AscendV1Saver().finish(records, EMPTY)
    assert list(files) == ["quant_model_description.json"]
    return dict(files["quant_model_description.json"])


def test_description_types_every_tensor_and_biases_as_float(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(specs["static"])
    records = [TensorRecord("model.embed_tokens.weight", None, 8)]
    records += [TensorRecord(key, module.spec, t.nbytes) for key, t in AscendV1Saver().encode("a.o", module, "float16")]
    assert describe(records) == {
        "version": "1.0.0",
        "model_quant_type": "W8A8",
        "group_size": 0,
        "metadata": {},
        "optional": {},
        "model.embed_tokens.weight": "FLOAT",
        "a.o.weight": "W8A8",
        "a.o.quant_bias": "W8A8",
        "a.o.input_scale": "W8A8",
        "a.o.input_offset": "W8A8",
        "a.o.deq_scale": "W8A8",
        "a.o.bias": "FLOAT",
    }


@pytest.mark.parametrize(
    ("names", "strongest", "group_size"),
    [
        ([], "FLOAT", 0),
        (["w8a16-group"], "W8A16", 16),
        (["w8a16", "w4a16-group"], "W4A16", 16),
        (["dynamic", "w4a16-group"], "W8A8_DYNAMIC", 16),
        (["dynamic", "static"], "W8A8", 0),
        (["w4a8", "static", "w8a16"], "W4A8_DYNAMIC", 0),
    ],
)
def test_model_is_called_after_its_strongest_type(
    names: list[str], strongest: str, group_size: int, specs: Mapping[str, QuantSpec]
) -> None:
    description = describe([TensorRecord(f"a.{name}.weight", specs[name], 1) for name in names])
    assert description["model_quant_type"] == strongest
    assert description["group_size"] == group_size


@pytest.mark.parametrize(
    ("config", "limit"),
    [({}, 4 << 30), ({"part_file_size": 0}, 0), ({"part_file_size": 0.5}, 1 << 29), ({"part_file_size": 1e-12}, 1)],
)
def test_part_file_size_is_in_gib_and_only_zero_means_one_file(config: dict[str, Any], limit: int) -> None:
    saver = AscendV1Saver.from_config({"type": "ascendv1_saver", **config})
    assert saver.max_shard_bytes == limit
    assert saver.weights_name(EMPTY) == "quant_model_weights"


def test_quantization_config_is_removed_at_every_depth() -> None:
    config = {
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"quantization_config": {}, "hidden_size": 4},
        "thinker_config": {"text_config": {"quantization_config": {}, "layers": 2}},
        "vision_config": None,
        "rope_scaling": {"quantization_config": "not a config of a part"},
    }
    assert AscendV1Saver().edit_config(config, [], EMPTY) == {
        "text_config": {"hidden_size": 4},
        "thinker_config": {"text_config": {"layers": 2}},
        "vision_config": None,
        "rope_scaling": {"quantization_config": "not a config of a part"},
    }


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("static", "float32", "bfloat16"),
        ("dynamic", "bfloat16", "float32"),
        ("w8a16-group", "bfloat16", "float32"),
        ("w4a8", "float32", "float32"),
        ("w4a16-group", "bfloat16", "float32"),
    ],
)
def test_scale_dtypes_are_those_of_the_engines_parameters(
    name: str, weight: str, activation: str, specs: Mapping[str, QuantSpec]
) -> None:
    assert AscendV1Saver().scale_dtypes(specs[name], "bfloat16") == (weight, activation)


def test_scale_dtypes_of_a_scheme_without_a_type_are_no_error() -> None:
    spec = QuantSpec(TensorSpec("int4", "per_channel"), TensorSpec("int4", "per_token"))
    assert AscendV1Saver().scale_dtypes(spec, "float16") == ("float32", "float32")
