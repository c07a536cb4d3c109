# SPDX-License-Identifier: Apache-2.0
"""What a plan refuses before a weight is read: everything at once, each at its line and column."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelslim.errors import Diagnostic, ModelError, ModelSlimError, ProtocolError, UsageError
from modelslim.patterns import Selector
from modelslim.plan import Plan, make_plan
from modelslim.registry import Registry
from modelslim.session import Session
from modelslim.types import Subgraph, Topology

HEAD = "apiversion: modelslim_v1\nspec:\n  process:\n"
SAVE = "  save:\n    - type: ascendv1_saver\n"
W8A16 = "{weight: {}}"

Protocol = Callable[[str], Path]


def entry(include: str = '["*"]', qconfig: str = W8A16, more: str = "") -> str:
    return f"    - type: linear_quant\n      qconfig: {qconfig}\n      include: {include}\n{more}"


def refused(model: Path, file: Path, kind: type[ModelSlimError] = ProtocolError) -> list[Diagnostic]:
    with pytest.raises(ModelSlimError) as caught:
        make_plan(model, file, device="cpu")
    assert type(caught.value) is kind
    assert all(problem.file == str(file) for problem in caught.value.diagnostics if problem.line)
    return list(caught.value.diagnostics)


def accepted(model: Path, file: Path) -> Plan:
    return make_plan(model, file, device="cpu")


def places(problems: list[Diagnostic]) -> list[tuple[int | None, int | None]]:
    return [(problem.line, problem.column) for problem in problems]


def place(text: str, needle: str) -> tuple[int, int]:
    """Line and column of the only ``needle`` in a text, counted by hand."""
    assert text.count(needle) == 1, needle
    before = text[: text.index(needle)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


# Patterns


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*self_attn*", "*mpl*"]', more='      exclude: ["*q_pro"]\n') + SAVE
    include, exclude = refused(tiny_llama, protocol(text))
    assert places([include, exclude]) == [place(text, '"*mpl*"'), place(text, '"*q_pro"')]
    assert include.path == "spec.process[0].include[1]"
    assert include.message == "the pattern '*mpl*' matches no linear of the model"
    assert include.hint == "did you mean 'mlp'?"
    assert exclude.hint == "did you mean 'q_proj'?"


def test_a_pattern_that_nothing_resembles_is_refused_with_what_there_is(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*xyzzy*"]') + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert problem.hint.startswith("known: ") and "down_proj" in problem.hint
    assert "0" not in problem.hint, "numbers of layers are no names"


def test_a_pattern_of_modules_is_told_from_one_of_linears(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*", "*.mlp"]') + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert places([problem]) == [place(text, '"*.mlp"')]
    assert problem.hint == "it matches modules, but no linear that can be quantized"


def test_a_layer_that_is_not_there_is_refused(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["model.layers.{0,1,2}.*", "model.layers.3.*"]') + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert places([problem]) == [place(text, '"model.layers.3.*"')]


def test_patterns_inside_a_group_have_their_place(tiny_llama: Path, protocol: Protocol) -> None:
    text = (
        HEAD
        + "    - type: group\n      configs:\n"
        + "        - {type: linear_quant, qconfig: {weight: {}}, include: ['*mlp*']}\n"
        + "        - type: group\n          configs:\n"
        + "            - {type: linear_quant, qconfig: {weight: {}}, include: ['*self_attn*', '*nothing*']}\n"
        + SAVE
    )
    (problem,) = refused(tiny_llama, protocol(text))
    assert problem.path == "spec.process[0].configs[1].configs[0].include[1]"
    assert places([problem]) == [place(text, "'*nothing*'")]


def test_a_star_leaves_the_head_alone_and_its_name_selects_it(tiny_llama: Path, protocol: Protocol) -> None:
    everything = accepted(tiny_llama, protocol(HEAD + entry('["*"]') + SAVE))
    assert len(everything.specs) == 21 and "lm_head" not in everything.specs
    head = accepted(tiny_llama, protocol(HEAD + entry('["lm_head"]') + SAVE))
    assert list(head.specs) == ["lm_head"]
    both = accepted(tiny_llama, protocol(HEAD + entry('["*", "lm_head"]') + SAVE))
    assert set(both.specs) == {*everything.specs, "lm_head"}
    without = HEAD + entry('["*", "lm_head"]', more='      exclude: ["lm_head"]\n') + SAVE
    assert set(accepted(tiny_llama, protocol(without)).specs) == set(everything.specs)


def test_a_head_that_is_meant_and_not_named_outright_is_refused(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*head"]') + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert "must be named outright" in problem.hint


def test_excluding_what_is_never_quantized_is_accepted(tiny_moe: Path, protocol: Protocol) -> None:
    """The guide excludes routers; here they are no linears, and the protocol is right nevertheless."""
    text = HEAD + entry('["*"]', more='      exclude: ["*mlp.gate", "*experts*"]\n') + SAVE
    plan = accepted(tiny_moe, protocol(text))
    assert {name.rpartition(".")[2] for name in plan.specs} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    typo = text.replace("*mlp.gate", "*mlp.gaet")
    (problem,) = refused(tiny_moe, protocol(typo))
    assert places([problem]) == [place(typo, '"*mlp.gaet"')]


def test_including_what_cannot_be_quantized_is_refused(tiny_moe: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*self_attn*", "*layernorm"]') + SAVE
    (problem,) = refused(tiny_moe, protocol(text))
    assert places([problem]) == [place(text, '"*layernorm"')]
    assert problem.hint == "it matches modules, but no linear that can be quantized"


# Claims


def test_a_linear_that_two_entries_claim_is_refused_at_the_second(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*mlp*"]') + entry('["*down_proj", "*self_attn*"]') + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    second = text.rindex("type: linear_quant")
    assert places([problem]) == [(text[:second].count("\n") + 1, 7)]
    assert problem.path == "spec.process[1]"
    assert problem.message == (
        "quantizes model.layers.0.mlp.down_proj and 2 other linears, which spec.process[0] quantizes already"
    )


def test_claims_across_groups_name_the_entry_that_was_first(tiny_llama: Path, protocol: Protocol) -> None:
    member = "        - {type: linear_quant, qconfig: {weight: {}}, include: ['%s']}\n"
    group = "    - type: group\n      configs:\n"
    text = HEAD + group + member % "*.0.mlp*" + member % "*.1.mlp*" + group + member % "*.1.mlp.up_proj" + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert problem.path == "spec.process[1].configs[0]"
    assert problem.message.startswith("quantizes model.layers.1.mlp.up_proj, which spec.process[0].configs[1] quant")


def test_entries_that_share_the_linears_out_are_accepted(tiny_llama: Path, protocol: Protocol) -> None:
    dynamic = "{act: {scope: per_token}, weight: {}}"
    text = HEAD + entry('["*mlp*"]') + entry('["*"]', dynamic, '      exclude: ["*mlp*"]\n') + SAVE
    specs = accepted(tiny_llama, protocol(text)).specs
    assert {spec.scheme for name, spec in specs.items() if "mlp" in name} == {"W8A16"}
    assert {spec.scheme for name, spec in specs.items() if "mlp" not in name} == {"W8A8_DYNAMIC"}
    assert len(specs) == 21


# Schemes


def test_a_group_size_that_does_not_divide_is_refused_with_sizes_that_do(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry(qconfig="{weight: {scope: per_group, group_size: 64}}") + SAVE
    problems = refused(tiny_llama, protocol(text))
    at_weight = [problem for problem in problems if (problem.line, problem.column) == place(text, "{scope: per_group")]
    assert len(at_weight) == 1
    assert "group_size 64 does not divide the 96 inputs of model.layers.0.mlp.down_proj" in at_weight[0].message
    assert "32" in at_weight[0].hint
    accepted(tiny_llama, protocol(text.replace("64}", "32}")))
    accepted(tiny_llama, protocol(text.replace('["*"]', '["*self_attn*"]')))


def test_a_scheme_that_the_saver_lacks_is_refused_where_it_was_chosen(tiny_llama: Path, protocol: Protocol) -> None:
    wrong = "{act: {scope: per_token}, weight: {symmetric: false}}"
    text = HEAD + entry('["*mlp*"]') + entry('["*self_attn*"]', wrong) + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert problem.path == "spec.process[1].qconfig"
    assert places([problem]) == [place(text, "{act: ")]
    assert "asymmetric weights" in problem.message


def test_a_second_saver_is_refused(tiny_llama: Path, protocol: Protocol) -> None:
    second = "    - {type: ascendv1_saver, part_file_size: 1}\n"
    text = HEAD + entry() + SAVE + second
    problems = refused(tiny_llama, protocol(text))
    assert [problem.path for problem in problems] == ["spec.save[1]"]
    assert places(problems) == [place(text, "{type: ascendv1_saver")]


# All at once


def test_mistakes_of_every_kind_are_reported_together_in_the_order_of_the_file(
    tiny_llama: Path, protocol: Protocol
) -> None:
    text = (
        HEAD
        + entry('["*mpl*", "*gate_proj", "*up_proj"]')
        + entry('["*self_attn*"]', "{act: {scope: per_token}, weight: {scope: per_group, group_size: 48}}")
        + entry('["*.1.self_attn*"]')
        + entry('["*down_proj"]', "{weigth: {}}")
        + SAVE
        + "      part_file_sise: 4\n"
        + "    - {type: ascendv1_saver, part_file_size: 1}\n"
    )
    problems = refused(tiny_llama, protocol(text))
    assert places(problems) == sorted(places(problems), key=lambda pair: (pair[0] or 0, pair[1] or 0))
    expected = {
        place(text, '"*mpl*"'): "matches no linear",
        place(text, "{scope: per_group"): "group_size 48 does not divide the 64 inputs",
        place(text, "weigth"): "weigth",
        place(text, "part_file_sise"): "part_file_sise",
    }
    for where, message in expected.items():
        messages = [problem.message for problem in problems if (problem.line, problem.column) == where]
        assert any(message in told for told in messages), message
    assert any("spec.process[1] quantizes already" in problem.message for problem in problems)


def test_a_mistake_of_the_protocol_is_not_hidden_by_a_missing_dataset(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*mpl*", "*mlp*"]', "{act: {}, weight: {}}") + SAVE + "  dataset: absent.jsonl\n"
    assert places(refused(tiny_llama, protocol(text))) == [place(text, '"*mpl*"'), place(text, "absent.jsonl")]


def test_a_mistake_of_the_protocol_is_not_hidden_by_a_wrong_model(tmp_path: Path, protocol: Protocol) -> None:
    text = HEAD + entry(qconfig="{weight: {scoope: per_group}}") + SAVE
    (problem,) = refused(tmp_path / "absent", protocol(text), ModelError)
    assert places([problem]) == [place(text, "scoope")]


def test_a_mistake_of_the_protocol_is_not_hidden_by_a_wrong_device(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry(qconfig="{weight: {scoope: per_group}}") + SAVE
    with pytest.raises(UsageError) as caught:
        make_plan(tiny_llama, protocol(text), device="gpu")
    assert places(list(caught.value.diagnostics)) == [place(text, "scoope")]


def test_a_dataset_is_not_asked_for_where_nothing_is_calibrated(tiny_llama: Path, protocol: Protocol) -> None:
    file = protocol(HEAD + entry() + SAVE + "  dataset: beside.jsonl\n")
    (problem,) = refused(tiny_llama, file)  # a slip is told all the same
    assert problem.path == "spec.dataset"
    (file.parent / "beside.jsonl").write_text("not JSON")
    plan = accepted(tiny_llama, file)
    assert plan.dataset is None and list(plan.samples) == []


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_model_that_is_quantized_already_is_refused(
    dtype: torch.dtype, stored: str, tiny_llama: Path, protocol: Protocol, tmp_path: Path
) -> None:
    model = tmp_path / "quantized"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.ones(tensors[name].shape).to(dtype)}, model / "model.safetensors")
    (problem,) = refused(model, protocol(HEAD + entry() + SAVE), ModelError)
    assert f"{name} holds {stored} codes" in problem.message


@pytest.mark.parametrize("pattern", ["*experts*", "*mlp.experts.*", "*.experts.{0,1,2,3}.{gate,up,down}_proj"])
def test_fused_experts_are_selected_as_if_each_were_linears_of_its_own(
    pattern: str, tiny_moe: Path, protocol: Protocol
) -> None:
    plan = accepted(tiny_moe, protocol(HEAD + entry(f'["{pattern}"]') + SAVE))
    stored = {name for part in tiny_moe.glob("*.safetensors") for name in load_file(part)}
    experts = {name for name in stored if ".experts." in name}
    assert {f"{name}.weight" for name in plan.specs} == experts
    assert plan.replaced == experts


def test_the_name_of_the_fused_weight_selects_it(tiny_moe: Path, protocol: Protocol) -> None:
    info = accepted(tiny_moe, protocol(HEAD + entry() + SAVE)).info
    chosen = Selector(["*gate_up_proj"]).select(info.linears.values())
    assert {linear.name.rpartition(".")[2] for linear in chosen} == {"gate_proj", "up_proj"}
    assert len(chosen) == 2 * 4 * len(info.units)


@pytest.mark.parametrize("pattern", ["*experts.0.*", "*experts.*.gate_proj", "*.experts.[0-2].*"])
def test_some_of_what_is_fused_cannot_be_quantized_alone(pattern: str, tiny_moe: Path, protocol: Protocol) -> None:
    problems = refused(tiny_moe, protocol(HEAD + entry(f'["{pattern}"]') + SAVE))
    (problem,) = (problem for problem in problems if "fused experts" in problem.message)
    assert problem.path == "spec.process[0]"
    assert "which are one weight of fused experts" in problem.message
    assert "'*experts*'" in problem.hint


def test_an_algorithm_that_knows_no_fused_experts_is_not_given_any(
    tiny_moe: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry.scan().load("algorithms", "linear_quant"), "takes_experts", False)
    (problem,) = refused(tiny_moe, protocol(HEAD + entry('["*experts*"]') + SAVE))
    assert problem.message.startswith("linear_quant does not quantize fused experts, and it selects model.layers.0.")
    assert "exclude" in problem.hint


def test_a_dataset_is_looked_for_beside_the_protocol(tiny_llama: Path, protocol: Protocol) -> None:
    file = protocol(HEAD + entry(qconfig="{act: {}, weight: {}}") + SAVE + "  dataset: beside.jsonl\n")
    (file.parent / "beside.jsonl").write_text('"a text"\n')
    plan = accepted(tiny_llama, file)
    assert plan.dataset == file.parent / "beside.jsonl" and list(plan.samples) == ["a text"]


# The model


def damaged(tiny_llama: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_llama, copy)
    return copy


def test_weights_that_do_not_fit_config_json_are_named_before_a_run(
    tiny_llama: Path, tmp_path: Path, protocol: Protocol
) -> None:
    copy = damaged(tiny_llama, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, copy / "model.safetensors")
    problems = refused(copy, protocol(HEAD + entry() + SAVE), ModelError)
    assert len(problems) == 2
    assert any("holds no tensor for model.layers.1.mlp.up_proj.weight" in problem.message for problem in problems)
    assert any(
        "model.norm.weight has the shape [65], config.json asks for [64]" in problem.message for problem in problems
    )


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_a_config_that_does_not_say_what_the_model_is_is_refused(
    tiny_llama: Path, tmp_path: Path, protocol: Protocol, key: str
) -> None:
    copy = damaged(tiny_llama, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"config.json has no {key}"):
        make_plan(copy, protocol(HEAD + entry() + SAVE), device="cpu")


def test_planning_reads_no_weight(tiny_llama: Path, tmp_path: Path, protocol: Protocol, w8a8_static: str) -> None:
    copy = damaged(tiny_llama, tmp_path)
    file = copy / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(header)
        stream.write(b"\xff" * (file.stat().st_size - header))  # NaN, which every reading would find
    plan = accepted(copy, protocol(w8a8_static))
    assert all(parameter.is_meta for parameter in plan.model.parameters())


# What a plan knows


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
def test_a_plan_knows_every_tensor_of_the_result(
    name: str, request: pytest.FixtureRequest, protocol: Protocol, w8a8_dynamic: str
) -> None:
    model = request.getfixturevalue(name)
    plan = accepted(model, protocol(w8a8_dynamic))
    stored = load_file(model / "model.safetensors")
    linears = {name for name in stored if name.endswith("_proj.weight")}
    assert plan.replaced == linears
    sizes = plan.result_sizes()
    assert {name: size for name, size in sizes.items() if name in stored and name not in linears} == {
        name: tensor.nbytes for name, tensor in stored.items() if name not in linears
    }
    for name in linears:
        assert sizes[name] == stored[name].numel()  # one byte a weight


def test_the_engine_s_scale_types_are_in_the_plan(tiny_llama: Path, protocol: Protocol, w8a8_dynamic: str) -> None:
    plan = accepted(tiny_llama, protocol(w8a8_dynamic))
    scales = {(spec.weight.scale_dtype, spec.activation.scale_dtype) for spec in plan.specs.values()}
    assert scales == {("bfloat16", "float32")}  # as vLLM-Ascend holds them for a bfloat16 model


def test_a_published_name_that_nobody_knows_is_a_warning(tiny_llama: Path, protocol: Protocol) -> None:
    plan = make_plan(tiny_llama, protocol(HEAD + entry() + SAVE), device="cpu", model_type="My-Llama-9B")
    assert any("no adapter is registered for --model_type My-Llama-9B" in warning for warning in plan.warnings)
    assert plan.adapter == "transformers"


def test_stacked_experts_that_no_adapter_takes_apart_are_said(
    tiny_moe: Path, tiny_llama: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = protocol(HEAD + entry('["*self_attn*"]') + SAVE)
    assert accepted(tiny_moe, file).warnings == []
    assert accepted(tiny_llama, file).warnings == []
    monkeypatch.setattr("modelslim_transformers.experts._is_conventional", lambda module: False)
    (warning,) = accepted(tiny_moe, file).warnings
    tensors = {name: tensor for part in tiny_moe.glob("*.safetensors") for name, tensor in load_file(part).items()}
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    share = experts / sum(tensor.numel() for tensor in tensors.values())
    assert f"stay float: {share:.0%} of all parameters" in warning
    (problem,) = refused(tiny_moe, protocol(HEAD + entry('["*experts*"]') + SAVE))
    assert "stacked" in problem.hint


def test_a_protocol_that_selects_nothing_is_refused(tiny_llama: Path, protocol: Protocol) -> None:
    text = HEAD + entry('["*q_proj"]', more='      exclude: ["*"]\n') + SAVE
    (nothing,) = refused(tiny_llama, protocol(text))
    assert (nothing.path, nothing.message) == ("spec.process", "selects no linear: nothing would be quantized")


def test_a_weight_that_layers_share_is_not_changed(
    tiny_llama: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelslim_transformers.adapter import TransformersAdapter

    build = TransformersAdapter.build

    def tied(self: TransformersAdapter) -> Any:
        model = build(self)
        layers = model.get_submodule("model.layers")
        if len(layers) == 3:  # the model itself, and not the tiny one on which its forward is proven
            layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
        return model

    readers = tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
    careless = Topology((Subgraph("norm-linear", "model.layers.1.input_layernorm", readers),))
    monkeypatch.setattr(TransformersAdapter, "build", tied)
    monkeypatch.setattr(Session, "get_adapter_config_for_subgraph", lambda _session, _model: careless)
    text = HEAD + "    - {type: iter_smooth}\n" + entry() + SAVE
    (problem,) = refused(tiny_llama, protocol(text))
    assert problem.path == "spec.process[0]"
    message = "changes model.layers.1.input_layernorm.weight, which is model.layers.0.input_layernorm.weight as well"
    assert message in problem.message
