# SPDX-License-Identifier: Apache-2.0
"""``quantization_config``: what the package accepts, and exactly the linears that are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules, match_targets
from torch import nn

from modelslim.api import ModelError, PlannedModel, QuantSpec, TensorRecord
from modelslim_compressed_tensors.arguments import arguments, parse
from modelslim_compressed_tensors.config import read_groups
from modelslim_compressed_tensors.saver import CompressedTensorsSaver

Planned = Callable[..., PlannedModel]
Specs = Mapping[str, QuantSpec]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def records(model: PlannedModel) -> list[TensorRecord]:
    """What is written of a planned model; the names of the parts do not matter here."""
    names = {model.linears[name].stored: spec for name, spec in model.specs.items()}
    written = [TensorRecord(f"{name}.weight_scale", spec, 4) for name, spec in names.items()]
    return [*written, TensorRecord("model.norm.weight", None, 4)]


def config_of(model: PlannedModel) -> dict[str, Any]:
    found = CompressedTensorsSaver().edit_config({}, records(model), model)["quantization_config"]
    assert isinstance(found, dict)
    return found


def decoder(specs: Mapping[str, QuantSpec | None], layers: int = 3) -> dict[str, QuantSpec | None]:
    """Linears of a decoder with experts, by the last part of their names; those that are not given stay float."""
    names = ["lm_head"]
    for layer in range(layers):
        names += [f"model.layers.{layer}.self_attn.{last}" for last in ATTENTION]
        names += [f"model.layers.{layer}.mlp.shared_expert.{last}" for last in ("gate_proj", "up_proj", "down_proj")]
        names += [
            f"model.layers.{layer}.mlp.experts.{expert}.{last}"
            for expert in range(2)
            for last in ("gate_proj", "up_proj", "down_proj")
        ]
    return {name: next((spec for key, spec in specs.items() if key in name), None) for name in names}


def as_modules(names: Mapping[str, Any]) -> nn.Module:
    """A model that holds a linear under each name."""
    root = nn.Module()
    for name in names:
        parent, _, last = name.rpartition(".")
        module = root
        for part in parent.split(".") if parent else ():
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, nn.Linear(1, 1, device="meta"))
    return root


def matched(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, str]:
    """Which linear is in which group, as the package finds out when it loads a model."""
    parsed = QuantizationConfig.model_validate(config)
    groups = {target: key for key, group in parsed.config_groups.items() for target in group.targets}
    found = match_named_modules(as_modules(names), groups, parsed.ignore)
    return {name: groups[match_targets(name, module, groups)[0]] for name, module in found}


CASES: Mapping[str, Mapping[str, str]] = {
    "one scheme": {"model.layers": "w4a16-group"},
    "one scheme for attention": {"self_attn": "static"},
    "one scheme for experts": {".experts.": "dynamic"},
    "with the head": {"model.layers": "w8a16", "lm_head": "w8a16"},
    "head of another scheme": {"model.layers": "w4a16", "lm_head": "w8a16"},
    "two schemes": {".experts.": "w4a16", "self_attn": "static"},
    "schemes of one format": {"shared_expert": "w8a16", "self_attn": "w4a16-group"},
    "by layer": {"layers.1.": "w4a16", "layers.0.": "dynamic", "layers.2.mlp": "dynamic-asymmetric"},
    "down_proj apart": {"down_proj": "w8a16", "up_proj": "w4a16", "gate_proj": "w4a16"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_linear_is_in_the_group_of_its_scheme_and_no_other_is_in_one(
    case: str, specs: Specs, planned: Planned
) -> None:
    linears = decoder({key: specs[name] for key, name in CASES[case].items()})
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    config = config_of(planned(linears, matrices=routers))
    groups = matched(config, {**linears, **dict.fromkeys(routers)})
    assert groups.keys() == {name for name, spec in linears.items() if spec is not None}
    for name, group in groups.items():
        spec = linears[name]
        assert spec is not None
        assert config["config_groups"][group]["weights"] == arguments(spec.weight, inputs=False)
        inputs = None if spec.activation.is_float else arguments(spec.activation, inputs=True)
        assert config["config_groups"][group]["input_activations"] == inputs
    # The way back finds the same, in whatever order.
    back = read_groups(config, "config.json")
    for name, spec in linears.items():
        group = back.of(name)
        assert (None if group is None else group.spec) == spec
    assert all(back.of(router) is None for router in routers)


def test_one_scheme_is_compact(specs: Specs, planned: Planned) -> None:
    linears = decoder({"model.layers": specs["static-asymmetric"]})
    assert config_of(planned(linears)) == {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "quantization_status": "compressed",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "tensor",
                    "dynamic": False,
                },
                "output_activations": None,
                "format": "int-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def test_classes_are_no_target_among_several_schemes(specs: Specs, planned: Planned) -> None:
    linears = decoder({".experts.": specs["w4a16"], "self_attn": specs["static"], "shared": specs["w4a16"]})
    config = config_of(planned(linears))
    assert config["format"] == "mixed-precision"
    groups = [(group["format"], group["targets"]) for group in config["config_groups"].values()]
    assert groups == [
        (
            "pack-quantized",
            [
                r"re:(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\.(?:down_proj|gate_proj|up_proj)$",
                r"re:(?:.*\.)?layers\.\d+\.mlp\.shared_expert\.(?:down_proj|gate_proj|up_proj)$",
            ],
        ),
        ("int-quantized", [r"re:(?:.*\.)?layers\.\d+\.self_attn\.(?:k_proj|o_proj|q_proj|v_proj)$"]),
    ]


def test_routed_experts_come_first(specs: Specs, planned: Planned) -> None:
    linears = decoder({"shared": specs["w8a16"], ".experts.": specs["w4a16"]})
    groups = config_of(planned(linears))["config_groups"]
    assert r"mlp\.experts" in groups["group_0"]["targets"][0]


def test_specs_that_differ_in_the_dtype_of_scales_are_one_group(specs: Specs, planned: Planned) -> None:
    spec = specs["w4a16"]
    other = QuantSpec(replace(spec.weight, scale_dtype="bfloat16"), spec.activation)
    config = config_of(planned({"model.layers.0.a": spec, "model.layers.1.a": other}))
    assert list(config["config_groups"]) == ["group_0"]


def test_what_was_written_counts_and_not_what_was_planned(specs: Specs, planned: Planned) -> None:
    model = planned({"model.layers.0.a": specs["dynamic"], "model.layers.1.a": specs["dynamic"]})
    fallen = [TensorRecord("model.layers.0.a.weight_scale", specs["w8a16"], 4)]
    config = CompressedTensorsSaver().edit_config({}, fallen, model)["quantization_config"]
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized"]
    assert config["ignore"] == [r"re:(?:.*\.)?layers\.1\.a$"]


def test_tied_head_is_ignored_under_its_own_name(specs: Specs, planned: Planned) -> None:
    model = planned(
        {"model.layers.0.a": specs["w4a16"], "lm_head": None}, stored={"lm_head": "model.language_model.embed_tokens"}
    )
    assert config_of(model)["ignore"] == ["lm_head"]


def test_config_of_the_source_goes_at_every_depth(specs: Specs, planned: Planned) -> None:
    text = {"quantization_config": {}, "hidden_size": 4}
    source = {"text_config": text, "quantization_config": {"quant_method": "fp8"}}
    model = planned({"model.layers.0.a": specs["w4a16"]})
    edited = CompressedTensorsSaver().edit_config(dict(source), records(model), model)
    assert edited["text_config"] == {"hidden_size": 4}
    assert edited["quantization_config"]["quant_method"] == "compressed-tensors"
    assert CompressedTensorsSaver().edit_config(dict(source), [], model) == {"text_config": {"hidden_size": 4}}


def test_arguments_come_back(scheme: str, specs: Specs) -> None:
    weight, activation = specs[scheme].weight, specs[scheme].activation
    assert parse(arguments(weight, inputs=False), "weights", inputs=False) == weight
    if not activation.is_float:
        assert parse(arguments(activation, inputs=True), "input_activations", inputs=True) == activation


BASE: Mapping[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": False}


def groups(**changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**BASE, **changes}, "input_activations": None}
    return {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": []}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "config_groups are missing"),
        ({"config_groups": {"group_0": "W4A16"}}, "config_groups are missing"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "group_0: has no weights"),
        (groups(num_bits=5), "group_0: weights: int of 5 bits is not known"),
        (groups(strategy="chanel"), "strategy 'chanel' is not known"),
        (groups(group_size=None), "group_size is None"),
        (groups(dynamic=True), "dynamic is True"),
        (groups(strategy="token", group_size=None), "strategy 'token' is not known"),
        (groups(num_bits=4, type="float", group_size=16), "float of 4 bits is not known"),
        (groups(num_bits=8, type="float", strategy="block", group_size=None), "block_structure is None"),
        (groups(num_bits=8, type="float", strategy="channel"), "'pack-quantized' does not hold W8A16FP8"),
        ({**groups(), "format": "pack-quantised"}, "format 'pack-quantised' is not known"),
        ({**groups(), "transform_config": {"config_groups": {"R1": {}}}}, "online transforms"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(config: Mapping[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        read_groups(config, "config.json")


def test_config_of_another_writer_is_read() -> None:
    config = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "group_size": None, "strategy": "channel", "observer": "minmax"},
                "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token", "observer": None},
                "output_activations": None,
            }
        },
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    (group,) = read_groups(config, "config.json").groups
    assert group.spec.scheme == "W8A8_DYNAMIC" and group.format.name == "int-quantized"
    assert group.spec.weight.symmetric and group.spec.activation.symmetric
