# SPDX-License-Identifier: Apache-2.0
"""What is refused, or warned of, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from modelslim.api import FLOAT, PlannedModel, Problem, QuantSpec, TensorSpec
from modelslim.testing.saver import planned_problems
from modelslim_ascendv1.saver import AscendV1Saver

Plan = Callable[..., PlannedModel]
Specs = Mapping[str, QuantSpec]
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"

INT8, INT4 = TensorSpec("int8", "per_channel"), TensorSpec("int4", "per_channel")
FP8 = TensorSpec("fp8_e4m3", "per_channel")
FP8_TOKEN = TensorSpec("fp8_e4m3", "per_token")
FP8_BLOCK = TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128)
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)
GROUP8 = TensorSpec("int8", "per_group", group_size=16)
TOKEN, STATIC = TensorSpec("int8", "per_token"), TensorSpec("int8", "per_tensor")


def check(model: PlannedModel) -> list[Problem]:
    return planned_problems(AscendV1Saver(), "ascendv1_saver", model)


def only(model: PlannedModel) -> Problem:
    problems = check(model)
    assert len(problems) == 1, [problem.message for problem in problems]
    assert problems[0].hint
    return problems[0]


def attention(specs: Mapping[str, QuantSpec | None], layer: int = 0) -> dict[str, QuantSpec | None]:
    return {f"model.layers.{layer}.self_attn.{name}": spec for name, spec in specs.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("static", "static-asymmetric", "dynamic", "w8a16", "w8a16-asymmetric", "w8a8-mix", "w4a4", "fp8"),
        *("mxfp8", "mxfp4", "w4a8-mxfp"),
    ],
)
def test_dense_linears_of_every_type_that_the_engine_has_pass(name: str, specs: Specs, planned: Plan) -> None:
    assert check(planned({f"{LAYER}.mlp.down_proj": specs[name], "lm_head": None})) == []


@pytest.mark.parametrize(
    "name",
    [
        *("dynamic", "w4a8", "w4a16-group", "w4a16-group-asymmetric", "fp8"),
        *("mxfp8", "mxfp4", "w4a8-mxfp", "w4a16-mxfp4"),
    ],
)
def test_experts_of_every_type_that_the_engine_has_pass(name: str, specs: Specs, planned: Plan) -> None:
    members = ("gate_proj", "up_proj", "down_proj")
    experts = {f"{EXPERTS}.{index}.{member}": specs[name] for index in range(2) for member in members}
    assert check(planned(experts)) == []


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        (QuantSpec(GROUP8, TOKEN), "int8 per_group weights with int8 activations", "per_channel"),
        (QuantSpec(GROUP8, STATIC), "int8 per_group weights with int8 activations", "per_channel"),
        (QuantSpec(TensorSpec("int4", "per_group", group_size=16), TOKEN), "int4 per_group weights", "per_channel"),
        (QuantSpec(TensorSpec("int8", "per_channel", False), TOKEN), "asymmetric weights", "symmetric: true"),
        (QuantSpec(TensorSpec("int8", "per_channel", False), STATIC), "asymmetric weights", "symmetric: true"),
        (QuantSpec(INT8, TensorSpec("int8", "per_token", False)), "asymmetric per_token", "symmetric: true"),
        (QuantSpec(INT4, STATIC), "int4 weights with static int8 activations", "W4A8_DYNAMIC"),
        (QuantSpec(INT8, TensorSpec("int4", "per_token")), "int8 weights with int4 activations", "int8"),
        (QuantSpec(INT8, TensorSpec("fp8_e4m3", "per_token")), "int8 weights with fp8_e4m3 activations", "int8"),
        (QuantSpec(INT4, TensorSpec("int8", "pd_mix", False)), "int4 weights with static", "W4A8_DYNAMIC"),
        (QuantSpec(TensorSpec("int2", "per_channel"), FLOAT), "int2 weights", "int4"),
        (QuantSpec(FP8, FLOAT), "fp8_e4m3 weights with float activations", "per_token"),
        (QuantSpec(FP8, TensorSpec("fp8_e4m3", "per_tensor")), "with per_tensor fp8_e4m3 activations", "per_token"),
        (
            QuantSpec(TensorSpec("fp8_e4m3", "per_block", True, 128, group_rows=128), FP8_TOKEN),
            "per_block",
            "per_channel",
        ),
        (QuantSpec(MXFP8, FLOAT), "mxfp8 weights with float activations", "mxfp8"),
        (QuantSpec(MXFP8, MXFP4), "mxfp8 weights with per_block mxfp4 activations", "mxfp8"),
        (QuantSpec(MXFP4, TOKEN), "mxfp4 weights with per_token int8 activations", "mxfp8 or mxfp4 or float"),
        (QuantSpec(TensorSpec("nvfp4", "per_block", True, 16), FLOAT), "nvfp4 weights", "mxfp4"),
        (QuantSpec(INT8, TensorSpec("int8", "per_channel")), "per_channel activations", "per_token"),
        (QuantSpec(TensorSpec("int8", "per_tensor"), FLOAT), "per_tensor weights", "per_channel"),
        (QuantSpec(FLOAT, TOKEN), "float weights", "int8"),
        (QuantSpec(TensorSpec("int3", "per_channel"), FLOAT), "int3 weights", "int8, int4"),
        (QuantSpec(TensorSpec("int2", "per_group", group_size=16), FLOAT), "int2 weights", "int8, int4"),
        (QuantSpec(TensorSpec("int2", "per_channel"), TOKEN), "int2 weights", "int8, int4"),
    ],
)
def test_scheme_without_a_type_is_refused_once_with_what_is_possible(
    spec: QuantSpec, message: str, hint: str, planned: Plan
) -> None:
    linears = {f"model.layers.{index}.mlp.down_proj": spec for index in range(3)}
    problem = only(planned(linears))
    assert problem.fatal
    assert message in problem.message
    assert "model.layers.0.mlp.down_proj and 2 more" in problem.message
    assert hint in problem.hint
    assert problem.linear == "model.layers.0.mlp.down_proj"


def test_all_faults_of_a_scheme_are_told_at_once(planned: Plan) -> None:
    spec = QuantSpec(
        TensorSpec("int4", "per_group", symmetric=False, group_size=16), TensorSpec("int8", "per_token", False)
    )
    assert len(check(planned({"a.down_proj": spec}))) == 3


@pytest.mark.parametrize(
    "members",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("q_proj", "k_proj"),
        ("q", "k", "v"),
        ("gate_proj", "up_proj"),
        ("w1", "w3"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("in_proj_qkvz", "in_proj_ba"),
        ("in_proj_qkv", "in_proj_z"),
        ("in_proj_b", "in_proj_a"),
    ],
)
def test_fused_linears_must_all_be_quantized_or_none(members: tuple[str, ...], specs: Specs, planned: Plan) -> None:
    mixed = attention(dict.fromkeys(members, specs["dynamic"]) | {members[0]: None})
    problem = only(planned(mixed))
    assert problem.fatal
    assert f"{members[0]} FLOAT" in problem.message
    assert all(f"{member} W8A8_DYNAMIC" in problem.message for member in members[1:])
    assert problem.linear == f"{LAYER}.self_attn.{members[1]}"
    assert check(planned(attention(dict.fromkeys(members, specs["dynamic"])))) == []


def test_fused_linears_must_have_equal_schemes_to_the_last_detail(specs: Specs, planned: Plan) -> None:
    problem = only(planned(attention({"q_proj": specs["static"], "k_proj": specs["static-asymmetric"]})))
    assert "q_proj W8A8, k_proj W8A8 (activation asymmetric)" in problem.message
    problem = only(planned(attention({"q_proj": specs["static"], "k_proj": specs["dynamic"]})))
    assert "q_proj W8A8, k_proj W8A8_DYNAMIC" in problem.message


def test_layers_that_differ_in_the_same_way_are_one_problem(specs: Specs, planned: Plan) -> None:
    linears: dict[str, QuantSpec | None] = {}
    for layer in range(4):
        linears |= attention({"q_proj": specs["static"], "k_proj": None if layer < 3 else specs["dynamic"]}, layer)
    first, second = check(planned(linears))
    assert "model.layers.0.self_attn (and 2 more)" in first.message
    assert "in model.layers.3.self_attn:" in second.message


def test_linears_of_different_parents_are_not_fused(specs: Specs, planned: Plan) -> None:
    assert check(planned({"a.gate_proj": specs["static"], "b.up_proj": None})) == []


def test_all_linears_of_all_experts_of_a_layer_must_agree(specs: Specs, planned: Plan) -> None:
    def layer(index: int) -> dict[str, QuantSpec | None]:
        names = [f"model.layers.{index}.mlp.experts.{e}.{n}_proj" for e in range(3) for n in ("gate", "up", "down")]
        return dict.fromkeys(names, specs["dynamic"]) | {f"model.layers.{index}.mlp.experts.2.down_proj": None}

    problem = only(planned(layer(0) | layer(1)))
    assert problem.fatal
    assert f"{EXPERTS} (and 1 more)" in problem.message
    assert f"{EXPERTS}.0.gate_proj and 7 more W8A8_DYNAMIC" in problem.message
    assert f"{EXPERTS}.2.down_proj FLOAT" in problem.message


def test_w4a16_needs_inputs_in_eights(planned: Plan) -> None:
    name = f"{EXPERTS}.0.down_proj"
    spec = QuantSpec(TensorSpec("int4", "per_group", group_size=4), FLOAT)
    assert "8 inputs into one integer" in only(planned({name: spec}, shapes={name: (64, 60)})).message


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "w4a8-mxfp"])
def test_microscaling_needs_inputs_in_thirty_twos(name: str, specs: Specs, planned: Plan) -> None:
    problem = only(planned({"a.proj": specs[name]}, shapes={"a.proj": (64, 48)}))
    assert problem.fatal
    assert "48 inputs do not fill" in problem.message


def test_w4a8_needs_an_even_number_of_outputs(specs: Specs, planned: Plan) -> None:
    name = f"{EXPERTS}.0.up_proj"
    assert "number is odd" in only(planned({name: specs["w4a8"]}, shapes={name: (63, 64)})).message


def test_w4a8_needs_inputs_in_sixteenths_where_the_engine_cuts_inputs(specs: Specs, planned: Plan) -> None:
    down, up = f"{EXPERTS}.0.down_proj", f"{EXPERTS}.0.up_proj"
    shapes = {down: (64, 40), up: (64, 40)}
    problem = only(planned(dict.fromkeys(shapes, specs["w4a8"]), shapes=shapes))
    assert "16 equal slices" in problem.message
    assert problem.linear == down


def test_two_group_sizes_in_one_model_are_refused(specs: Specs, planned: Plan) -> None:
    other = QuantSpec(TensorSpec("int4", "per_group", group_size=32), FLOAT)
    problem = only(planned({f"{EXPERTS}.0.up_proj": specs["w4a16-group"], "m.layers.1.mlp.experts.0.up_proj": other}))
    assert problem.fatal
    assert f"16 ({EXPERTS}.0.up_proj), 32 (m.layers.1.mlp.experts.0.up_proj)" in problem.message


def test_w4a8_and_a_grouped_type_in_one_model_are_refused(specs: Specs, planned: Plan) -> None:
    one, two = f"{EXPERTS}.0.up_proj", "model.layers.1.mlp.experts.0.up_proj"
    problem = only(planned({one: specs["w4a8"], two: specs["w4a16-group"]}))
    assert problem.fatal
    assert one in problem.message
    assert two in problem.message


@pytest.mark.parametrize("name", ["self_attn.kv_b_proj", "eh_proj", "self_attn.indexer.weights_proj"])
def test_what_the_engine_holds_in_float_is_refused(name: str, specs: Specs, planned: Plan) -> None:
    linears = {f"model.layers.{index}.{name}": specs["dynamic"] for index in range(2)}
    problem = only(planned(linears))
    assert problem.fatal
    assert name.removeprefix("self_attn.") in problem.message
    assert f'"*.{name.removeprefix("self_attn.")}"' in problem.hint
    assert check(planned(dict.fromkeys(linears))) == []


def test_projection_of_another_kind_may_be_quantized(specs: Specs, planned: Plan) -> None:
    assert check(planned({"model.layers.0.router.weights_proj": specs["dynamic"]})) == []


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_tied_lm_head_is_refused(config: dict[str, Any], specs: Specs, planned: Plan) -> None:
    problem = only(planned({"lm_head": specs["dynamic"]}, config=config))
    assert problem.fatal
    assert problem.linear == "lm_head"
    assert check(planned({"lm_head": None}, config=config)) == []


def test_lm_head_that_is_not_stored_is_refused_as_tied(specs: Specs, planned: Plan) -> None:
    model = planned({"lm_head": specs["dynamic"]})
    assert check(model) == []
    bare = PlannedModel(model.config, model.dtype, model.linears, model.specs, frozenset({"embed_tokens.weight"}))
    assert only(bare).fatal


def test_linear_whose_name_begins_a_float_weights_name_is_refused(specs: Specs, planned: Plan) -> None:
    problem = only(planned({"a.down_proj": specs["dynamic"], "a.down_proj_x": None}))
    assert problem.fatal
    assert "a.down_proj_x.weight" in problem.message
    assert problem.linear == "a.down_proj"


def test_float_weight_that_is_no_linear_counts_as_well(specs: Specs, planned: Plan) -> None:
    linears = {f"model.layers.{index}.mlp.gate": specs["dynamic"] for index in range(3)}
    tensors = tuple(f"{name}_norm.weight" for name in linears)
    problem = only(planned(linears, tensors=tensors))
    assert "model.layers.0.mlp.gate and 2 more" in problem.message


@pytest.mark.parametrize(
    ("linears", "tensors"),
    [
        ({"a.down_proj": "dynamic", "a.down_proj_x": "w8a16"}, ()),  # both quantized
        ({"a.down_proj": None, "a.down_proj_x": "dynamic"}, ()),  # the shorter name is float anyway
        ({"a.q": "dynamic", "a.k": "dynamic", "a.v": "dynamic"}, ("a.q_norm.weight",)),  # fused: exact lookup
        ({"a.1.fc": "dynamic", "a.10.fc": None}, ()),  # the prefix is the whole name
        ({"a.down_proj": "dynamic"}, ("a.down_proj_x.scale",)),  # no .weight
    ],
)
def test_names_that_the_engine_tells_apart_pass(
    linears: dict[str, str | None], tensors: tuple[str, ...], specs: Specs, planned: Plan
) -> None:
    chosen = {name: specs[spec] if spec else None for name, spec in linears.items()}
    assert check(planned(chosen, tensors=tensors)) == []


@pytest.mark.parametrize(
    ("linear", "scheme"),
    [
        (f"{LAYER}.mlp.down_proj", "w4a8"),
        (f"{LAYER}.mlp.down_proj", "w4a16-group"),
        (f"{LAYER}.mlp.shared_experts.down_proj", "w4a8"),
        (f"{EXPERTS}.0.down_proj", "static"),
        (f"{EXPERTS}.0.down_proj", "w8a16"),
        (f"{LAYER}.mlp.down_proj", "w8a16-group"),
        (f"{EXPERTS}.0.down_proj", "w4a16"),
    ],
)
def test_type_that_the_engine_does_not_have_there_is_a_warning(
    linear: str, scheme: str, specs: Specs, planned: Plan
) -> None:
    problem = only(planned({linear: specs[scheme]}))
    assert not problem.fatal
    assert problem.linear == linear
    assert "vLLM-Ascend" in problem.message


def test_static_float32_model_is_warned_to_be_served_in_float16(specs: Specs, planned: Plan) -> None:
    problem = only(planned({"a.o_proj": specs["static"]}, dtype="float32"))
    assert not problem.fatal
    assert "--dtype float16" in problem.hint
    assert check(planned({"a.o_proj": specs["static"]}, dtype="float16")) == []


def test_experts_that_stay_one_tensor_are_warned_of(specs: Specs, planned: Plan) -> None:
    tensors = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    assert not only(planned({"a.o_proj": specs["dynamic"]}, tensors=tensors)).fatal
    apart = {f"{EXPERTS}.0.{name}": specs["dynamic"] for name in ("gate_proj", "up_proj", "down_proj")}
    assert check(planned(apart, tensors=tensors)) == []
    assert check(planned({"a.o_proj": None}, tensors=tensors)) == []


@pytest.mark.parametrize("scheme", ["w16a16s", "w8a8s"])
def test_sparse_types_are_written_though_the_engine_has_none(scheme: str, specs: Specs, planned: Plan) -> None:
    problem = only(planned({"a.o_proj": specs[scheme]}))
    assert not problem.fatal
    assert f"vLLM-Ascend has no {scheme.upper()}; it will not load a.o_proj" in problem.message


def test_sparse_float_weights_of_32_bits_are_warned_of(specs: Specs, planned: Plan) -> None:
    found = check(planned({"a.o_proj": specs["w16a16s"]}, dtype="float32"))
    assert [problem.fatal for problem in found] == [False, False]
    assert "W16A16S is for weights of 16 bits, and these are float32 (a.o_proj)" in found[0].message


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(TensorSpec("int8", "per_channel", sparse=True), TOKEN),
        QuantSpec(TensorSpec("int8", "per_channel", symmetric=False, sparse=True), STATIC),
        QuantSpec(TensorSpec("int4", "per_channel", sparse=True), FLOAT),
    ],
)
def test_other_sparse_schemes_have_no_type(spec: QuantSpec, planned: Plan) -> None:
    problem = next(one for one in check(planned({"a.o_proj": spec})) if one.fatal)
    assert "ascendv1 has no type for sparse W" in problem.message
