# SPDX-License-Identifier: Apache-2.0
"""What is found, what is left out, and that wrong subgraphs are refused; `AdapterContract` proves what is found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear, Subgraph, Topology
from modelslim.testing.topology import check_topology
from modelslim_transformers.adapter import TransformersAdapter
from modelslim_transformers.topology_proof import Fold, TinyModel, draw_scale, reproducible

PLAIN = ("v_proj -> o_proj (4, 2)", "up_proj -> down_proj")
FUSED = ("qkv_proj -> o_proj (4, 2) rows 48-63", "gate_up_proj -> down_proj rows 48-95")
QKV = "q_proj k_proj v_proj"
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8} | {
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "shared_expert_intermediate_size": 40,
    "head_dim": 8,
}
EXPECTED: Mapping[str, tuple[Mapping[str, Any], set[str]]] = {
    "llama": ({}, {f"input_layernorm -> {QKV}", "post_attention_layernorm -> gate_proj up_proj", *PLAIN}),
    "phi3": ({}, {"input_layernorm -> qkv_proj", "post_attention_layernorm -> gate_up_proj", *FUSED}),
    "gemma2": (
        {"head_dim": 8},
        {f"input_layernorm -> {QKV} 1+w", "pre_feedforward_layernorm -> gate_proj up_proj 1+w", *PLAIN},
    ),
    "olmo2": ({}, {*PLAIN}),
    "cohere": ({}, {f"input_layernorm -> {QKV} gate_proj up_proj", *PLAIN}),
    "nemotron": (
        {},
        {f"input_layernorm -> {QKV} 1+w", "post_attention_layernorm -> up_proj 1+w", "v_proj -> o_proj (4, 2)"},
    ),
    "gpt_oss": (
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        {f"input_layernorm -> {QKV}", "post_attention_layernorm -> router gate_up_proj", "v_proj -> o_proj (4, 2)"},
    ),
    "deepseek_v3": (
        LATENT,
        {
            "input_layernorm -> q_a_proj kv_a_proj_with_mqa",
            "q_a_layernorm -> q_b_proj",
            "kv_a_layernorm -> kv_b_proj",
            "kv_b_proj -> o_proj (4, 4) rows 8-63",
            "post_attention_layernorm -> gate gate_up_proj gate_proj up_proj",
            "gate_up_proj -> down_proj rows 24-47",
            "up_proj -> down_proj",
        },
    ),
    "qwen3_next": (
        DELTA,
        {
            f"input_layernorm -> {QKV} 1+w",
            "post_attention_layernorm -> gate_proj up_proj gate gate_up_proj shared_expert_gate 1+w",
            "v_proj -> o_proj (4, 2)",
            "gate_up_proj -> down_proj rows 24-47",
            "up_proj -> down_proj",
        },
    ),
    "gpt_bigcode": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48},
        {"ln_1 -> c_attn", "ln_2 -> c_fc", "c_attn -> c_proj (4, 1) rows 40-47"},
    ),
}
"""What must be found in the second layer, by the last parts of names."""
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "llama": {},
    "gpt_oss": {"model.layers.*.mlp.experts.down_proj": "no scale passes from mlp.experts.gate_up_proj to it"},
    "olmo2": {"model.layers.*.self_attn.q_proj": "no norm and no linear of its layer makes its input"},
    "nemotron": {"model.layers.*.mlp.down_proj": "no scale passes from mlp.up_proj to it"},
}


def words(subgraph: Subgraph) -> str:
    """The subgraph by the last parts of its names."""
    source, *targets = (name.rpartition(".")[2] for name in (subgraph.source, *subgraph.targets))
    heads = f" {subgraph.heads}" if subgraph.heads else ""
    rows = f" rows {subgraph.rows[0]}-{subgraph.rows[-1]}" if subgraph.rows else ""
    return f"{source} -> {' '.join(targets)}{heads}{rows}{' 1+w' * subgraph.unit_offset}"


@pytest.fixture
def topology(stored: Callable[..., Path], common: Mapping[str, Any]) -> Callable[[str], tuple[nn.Module, Topology]]:
    """A model on meta with its topology."""

    def derive(model_type: str) -> tuple[nn.Module, Topology]:
        settings = EXPECTED[model_type][0]
        adapter = TransformersAdapter(model_type, stored(model_type, **{**common, **settings}))
        model = adapter.init_model("meta")
        return model, adapter.get_adapter_config_for_subgraph(model)

    return derive


@pytest.mark.parametrize("model_type", EXPECTED)
def test_subgraphs_of_a_layer(model_type: str, topology: Any) -> None:
    _, found = topology(model_type)
    layer = [one for one in found.subgraphs if re.search(r"\.(layers|h)\.1\.", one.source)]
    assert {words(one) for one in layer} == EXPECTED[model_type][1]
    assert all(one.heads is None or one.type == "ov" for one in layer)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_every_linear_of_a_layer_is_a_target_or_left_out_with_a_reason(model_type: str, topology: Any) -> None:
    model, found = topology(model_type)
    targets = {target for one in found.subgraphs for target in one.targets if one.source}
    alone = {target for one in found.subgraphs for target in one.targets if not one.source}
    patterns = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in found.left_out]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, ExpertLinear)) and name != "lm_head":
            explained = any(pattern.fullmatch(name) for pattern in patterns)
            assert (name in targets) != explained, name
            assert (name in alone) == explained, name


ALONE: Mapping[str, set[str]] = {
    "llama": set(),
    "olmo2": {QKV, "gate_proj up_proj"},
    "nemotron": {"down_proj"},
    "gpt_oss": {"down_proj"},
    "qwen3_next": set(),
}
"""What is left out in the second layer: linears of one input together, whose input can be divided at run time."""


@pytest.mark.parametrize("model_type", ALONE)
def test_linears_that_nothing_can_be_folded_into_stand_together_by_their_input(model_type: str, topology: Any) -> None:
    _, found = topology(model_type)
    layer = [one for one in found.subgraphs if one.type == "non-fusion" and ".1." in one.targets[0]]
    assert {words(one).removeprefix(" -> ") for one in layer} == ALONE[model_type]
    assert all(one.source == "" and one.rows is None and one.heads is None for one in layer)


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_reasons(model_type: str, topology: Any) -> None:
    _, found = topology(model_type)
    for pattern, reason in LEFT_OUT[model_type].items():
        assert found.left_out[pattern].startswith(reason)
    assert bool(found.left_out) == bool(LEFT_OUT[model_type])


PUBLISHED: Mapping[str, tuple[Mapping[str, Any], set[str], str]] = {
    "bamba": (
        {"num_hidden_layers": 2, "attn_layer_indices": [1]},
        {"norm -> out_proj", "up_proj -> down_proj", "input_layernorm -> in_proj"},
        "",
    ),
    "mamba2": ({"num_hidden_layers": 2}, {"norm -> in_proj", "norm -> out_proj"}, ""),
    "falcon_h1": ({"num_hidden_layers": 2}, {f"input_layernorm -> in_proj {QKV}", "up_proj -> down_proj"}, "no scale"),
    "nemotron_h": ({}, {"norm -> in_proj", f"norm -> {QKV}", "norm -> gate up_proj up_proj"}, "no scale passes"),
    "zamba2": (
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        {"norm -> out_proj", "input_layernorm -> in_proj"},
        "its weight, or that of its source, is used in other layers as well",
    ),
    "longcat_flash": (
        {"num_layers": 2},
        {"kv_a_layernorm -> kv_b_proj", "q_a_layernorm -> q_b_proj", "up_proj -> down_proj"},
        "post_attention_layernorm.0 feeds it, and not linears alone",
    ),
    "gemma3n_text": (
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"pre_feedforward_layernorm -> gate_proj up_proj", "up_proj -> down_proj"},
        "input_layernorm feeds it, and not linears alone",
    ),
    "deepseek_v2": (
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
        {"input_layernorm -> q_a_proj kv_a_proj_with_mqa", "up_proj -> down_proj"},
        "",
    ),
}
"""Architectures in the sizes that are published, with a part of what is found, and a reason for what is left out."""


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_sizes_can_be_made_tiny(model_type: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    settings, expected, reason = PUBLISHED[model_type]
    CONFIG_MAPPING[model_type](**settings, dtype="bfloat16").save_pretrained(tmp_path)
    adapter = TransformersAdapter(model_type, tmp_path)
    found = adapter.get_adapter_config_for_subgraph(adapter.init_model("meta"))
    assert "*" not in found.left_out, found.left_out
    assert expected <= {words(one).partition(" (")[0].partition(" rows")[0] for one in found.subgraphs}
    reasons = set(found.left_out.values())
    assert any(one.startswith(reason) for one in reasons) if reason else not reasons


def test_topology_is_the_same_every_time_and_leaves_the_random_numbers_alone(topology: Any) -> None:
    state = torch.random.get_rng_state()
    assert topology("llama")[1] == topology("llama")[1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_architecture_that_cannot_be_made_tiny_is_left_out(
    stored: Callable[..., Path], common: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = TransformersAdapter("llama", stored("llama", **common))
    monkeypatch.setattr("modelslim_transformers.tiny.MOST_PARAMETERS", 10)
    found = adapter.get_adapter_config_for_subgraph(adapter.init_model("meta"))
    assert found.subgraphs == ()
    assert "a tiny model of its architecture has still" in found.left_out["*"]


class Gated(nn.Module):
    """An MLP whose upper branch is clamped, as a model that computes logits."""

    def __init__(self, limit: float | None, has_second_reader: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.limit, self.has_second_reader = limit, has_second_reader

    def forward(self, x: Tensor, use_cache: bool = False) -> Any:
        normed = self.norm(x)
        up = self.up(normed)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        y = self.down(self.gate(normed).sigmoid() * up)
        return SimpleNamespace(logits=y + normed if self.has_second_reader else y + x)


@pytest.mark.parametrize(("limit", "is_linear"), [(None, True), (20.0, False)])
def test_clamp_that_no_plain_input_reaches_is_seen(limit: float | None, is_linear: bool) -> None:
    """Random inputs give values near 1; the scales are what drives them beyond 20."""
    with reproducible():
        model = TinyModel(Gated(limit), [], [], [{"x": torch.randn(1, 5, 8)}])
        scale = draw_scale(12)
        reaction = model.react("up", scale, None, lambda count: scale if count == 12 else None)
    assert (reaction.readers == ["down"] and reaction.is_unchanged) == is_linear


@pytest.mark.parametrize("has_second_reader", [False, True])
def test_reader_that_is_no_module_is_seen(has_second_reader: bool) -> None:
    with reproducible():
        model = TinyModel(Gated(None, has_second_reader), [], [], [{"x": torch.randn(1, 5, 8)}])
        scale = draw_scale(8)
        reaction = model.react("norm", scale, None, lambda count: scale if count == 8 else None)
        targets = {"gate": scale, "up": scale}
        exact = [model.are_folds_exact([Fold("norm", targets, scale, None, one)]) for one in (False, True)]
    assert reaction.readers == ["up", "gate"]
    assert reaction.is_unchanged == (not has_second_reader)
    assert exact == [not has_second_reader, False]


WRONG = {
    "a reader is missing": Subgraph("norm-linear", "l.norm", ("l.up",)),
    "a target does not read it": Subgraph("norm-linear", "l.norm", ("l.gate", "l.up", "l.other")),
    "the norm multiplies by its weight alone": Subgraph("norm-linear", "l.norm", ("l.gate", "l.up"), unit_offset=True),
    "what lies between is not linear": Subgraph("up-down", "l.gate", ("l.down",)),
    "the rows are not in order": Subgraph("up-down", "l.up", ("l.down",), rows=(1, 0, *range(2, 12))),
}


class Layered(nn.Module):
    """One layer that is a unit, with a linear beside the others that reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.l = Gated(None)
        self.l.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l(x).logits + self.l.other(x)
        return y


@pytest.mark.parametrize("why", WRONG)
def test_verifier_refuses_a_wrong_subgraph(why: str) -> None:
    torch.manual_seed(0)
    model = Layered()
    right = (Subgraph("norm-linear", "l.norm", ("l.gate", "l.up")), Subgraph("up-down", "l.up", ("l.down",)))
    inputs = [{"x": torch.randn(1, 5, 8)}]
    check_topology(model, ["l"], Topology(right), inputs)
    with pytest.raises(AssertionError, match="the outputs change"):
        check_topology(model, ["l"], Topology((*right, WRONG[why])), inputs)
