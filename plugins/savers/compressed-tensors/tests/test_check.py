# SPDX-License-Identifier: Apache-2.0
"""What is refused, or warned of, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from modelslim.api import PlannedModel, Problem, QuantSpec
from modelslim.testing.saver import planned_problems
from modelslim_compressed_tensors.saver import CompressedTensorsSaver

Planned = Callable[..., PlannedModel]
Specs = Mapping[str, QuantSpec]
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"
MEMBERS = ("gate_proj", "up_proj", "down_proj")


def check(model: PlannedModel) -> list[Problem]:
    return planned_problems(CompressedTensorsSaver(), "compressed_tensors_saver", model)


def only(model: PlannedModel) -> Problem:
    problems = check(model)
    assert len(problems) == 1, [problem.message for problem in problems]
    assert problems[0].hint
    return problems[0]


def experts(spec: QuantSpec | None) -> dict[str, QuantSpec | None]:
    return {f"{EXPERTS}.{index}.{member}": spec for index in range(2) for member in MEMBERS}


def fused(model: PlannedModel) -> PlannedModel:
    """The same, its experts held in one weight per layer."""
    linears = {
        name: replace(one, bank=f"{EXPERTS}.gate_up_proj") if ".experts." in name else one
        for name, one in model.linears.items()
    }
    return replace(model, linears=linears)


@pytest.mark.parametrize("name", ["static", "static-asymmetric", "dynamic", "dynamic-asymmetric", "w8a16", "w4a16"])
def test_what_every_engine_loads_passes(name: str, specs: Specs, planned: Planned) -> None:
    linears = {f"{LAYER}.self_attn.{last}": specs[name] for last in ("q_proj", "k_proj", "v_proj")}
    assert check(planned({**linears, "lm_head": None})) == []


@pytest.mark.parametrize("name", ["dynamic", "w8a16", "w4a16-group", "w3a16"])
def test_experts_pass(name: str, specs: Specs, planned: Planned) -> None:
    assert check(planned(experts(specs[name]))) == []


def test_blocks_that_the_inputs_do_not_fill_are_refused(specs: Specs, planned: Planned) -> None:
    problem = only(planned({f"{LAYER}.a": specs["fp8-block"], f"{LAYER}.b": specs["fp8-block"]}))
    assert problem.fatal and f"64 inputs do not give ({LAYER}.a and 1 more)" in problem.message


def test_fused_blocks_that_the_outputs_do_not_fill_are_warned_of(specs: Specs, planned: Planned) -> None:
    linears = {f"{LAYER}.self_attn.{last}": specs["fp8-block"] for last in ("q_proj", "k_proj", "v_proj", "o_proj")}
    sizes = dict(zip(linears, ((256, 128), (64, 128), (64, 128), (64, 256)), strict=True))
    problem = only(planned(linears, shapes=sizes))
    assert not problem.fatal and f"64 are not; it will not load {LAYER}.self_attn.k_proj and 1 more" in problem.message
    assert check(planned({f"{LAYER}.self_attn.o_proj": specs["fp8-block"]}, shapes=sizes)) == []


def test_fused_linears_of_several_schemes_are_refused_once_for_all_layers(specs: Specs, planned: Planned) -> None:
    linears = {}
    for layer in range(3):
        parent = f"model.layers.{layer}.self_attn"
        linears |= {f"{parent}.q_proj": specs["static"], f"{parent}.k_proj": specs["static"], f"{parent}.v_proj": None}
    problem = only(planned(linears))
    assert problem.fatal and problem.linear == "model.layers.0.self_attn.q_proj"
    assert "one linear of q_proj, k_proj and v_proj" in problem.message
    assert "(and 2 more): q_proj W8A8, k_proj W8A8, v_proj FLOAT" in problem.message


def test_experts_of_several_schemes_are_refused(specs: Specs, planned: Planned) -> None:
    linears = {**experts(specs["w4a16"]), f"{EXPERTS}.1.down_proj": None}
    problem = only(planned(linears))
    assert problem.fatal and "all experts of a layer with one scheme" in problem.message


@pytest.mark.parametrize("name", ["eh_proj", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"])
def test_linears_that_the_engine_holds_in_float_are_refused(name: str, specs: Specs, planned: Planned) -> None:
    problem = only(planned({f"{LAYER}.{name}": specs["w4a16"]}))
    assert problem.fatal and f"{LAYER}.{name}" in problem.message and "exclude" in problem.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"tie_word_embeddings": True}},
        {"config": {"text_config": {"tie_word_embeddings": True}}},
        {"stored": {"lm_head": "model.embed_tokens"}},
    ],
)
def test_quantized_head_of_the_embedding_is_refused(changes: Mapping[str, Any], specs: Specs, planned: Planned) -> None:
    problem = only(planned({"lm_head": specs["w8a16"]}, **changes))
    assert problem.fatal and "token embedding" in problem.message
    assert check(planned({"lm_head": specs["w8a16"]})) == []


def test_bias_that_the_architecture_does_not_have_is_refused(specs: Specs, planned: Planned) -> None:
    quantized, kept = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"
    problem = only(planned({quantized: specs["static"]}, biased=[quantized]))
    assert problem.fatal and problem.linear == quantized and "symmetric: true" in problem.hint
    assert only(planned({quantized: specs["static"], kept: None}, biased=[kept])).linear is None


def test_zero_points_are_warned_of_with_the_versions(specs: Specs, planned: Planned) -> None:
    problem = only(planned({f"{LAYER}.a": specs["w4a16-asymmetric"], f"{LAYER}.b": specs["w4a16-asymmetric"]}))
    assert not problem.fatal and problem.linear == f"{LAYER}.a"
    assert "5.23" in problem.message and "0.20" in problem.message and "dequantize=True" in problem.hint


def test_w4a8_is_warned_of(specs: Specs, planned: Planned) -> None:
    assert "W4A8_DYNAMIC on CPUs only" in only(planned({f"{LAYER}.a": specs["w4a8-group"]})).message


def test_static_experts_are_warned_of(specs: Specs, planned: Planned) -> None:
    problem = only(planned(experts(specs["static"])))
    assert not problem.fatal and "W8A8 for dense linears only" in problem.message


@pytest.mark.parametrize(
    ("name", "other", "text"),
    [
        ("w4a16", "w4a16", ""),
        ("w4a16", "static", ""),
        ("fp8", "fp8", ""),
        ("mxfp4-weight", "mxfp4-weight", ""),
        ("dynamic", "w4a16", "stops with an error at others"),
        ("mxfp8", "w4a16", "stops with an error at others"),
        ("fp8-block", "w4a16", "stops with an error at others"),
        ("nvfp4", "w4a16", "nonsense, without an error"),
        ("", "w4a16", "stops with an error at these"),
        ("", "fp8", ""),
        ("", "", ""),
    ],
)
def test_what_transformers_does_with_fused_experts(
    name: str, other: str, text: str, specs: Specs, planned: Planned
) -> None:
    linears = {**experts(specs.get(name)), f"{LAYER}.self_attn.o_proj": specs.get(other)}
    whole = dict.fromkeys(linears, (128, 128))
    problems = check(fused(planned(linears, shapes=whole)))
    assert [problem.fatal for problem in problems] == ([False] if text else [])
    for problem in problems:
        assert f"{text} ({EXPERTS}.0.gate_proj and 5 more)" in problem.message and problem.hint


def test_experts_that_the_source_stores_stacked_are_warned_of_when_quantized(specs: Specs, planned: Planned) -> None:
    stacked = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    problem = only(fused(planned(experts(specs["w4a16"]), tensors=stacked)))
    assert not problem.fatal and "random weights" in problem.message
    kept = planned({**experts(None), f"{LAYER}.self_attn.o_proj": specs["w4a16"]}, tensors=stacked)
    assert check(fused(kept)) == []
