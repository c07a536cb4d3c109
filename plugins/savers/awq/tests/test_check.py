# SPDX-License-Identifier: Apache-2.0
"""What is refused before a weight is read, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelslim.api import PlannedModel, Problem, QuantSpec
from modelslim_awq.saver import AwqSaver

Planned = Callable[..., PlannedModel]
Scheme = Callable[..., QuantSpec]
LAYER = "model.layers.0"


def problems(model: PlannedModel, fatal: bool = True) -> list[Problem]:
    found = [problem for problem in AwqSaver().check(model) if problem.fatal == fatal]
    assert all(problem.hint for problem in found)
    return found


def only(model: PlannedModel, fatal: bool = True) -> Problem:
    (problem,) = problems(model, fatal)
    return problem


def test_symmetric_and_asymmetric_weights_go_together(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.up_proj": scheme(4, 32), f"{LAYER}.self_attn.o_proj": scheme(4, 32, False)})
    assert AwqSaver().check(model) == []


def test_two_group_sizes_are_refused(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({f"{LAYER}.mlp.up_proj": scheme(4, 32), f"{LAYER}.mlp.down_proj": scheme(4)}))
    assert f"32 ({LAYER}.mlp.up_proj), per_channel ({LAYER}.mlp.down_proj)" in problem.message
    assert problem.linear == f"{LAYER}.mlp.down_proj"


def test_outputs_that_do_not_fill_a_word_are_refused(planned: Planned, scheme: Scheme) -> None:
    name = f"{LAYER}.mlp.up_proj"
    assert "60 outputs" in only(planned({name: scheme(4)}, shapes={name: (60, 64)})).message
    assert problems(planned({name: scheme(4)}, shapes={name: (64, 60)})) == []


def test_head_is_refused_since_transformers_holds_it_in_float(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({"lm_head": scheme(4)}))
    assert "transformers" in problem.message
    assert problem.linear == "lm_head"
    tied = problems(planned({"lm_head": scheme(4)}, config={"tie_word_embeddings": True}))
    assert any("embedding" in problem.message for problem in tied)


def test_bias_that_smoothing_adds_is_refused(planned: Planned, scheme: Scheme) -> None:
    name = f"{LAYER}.mlp.up_proj"
    problem = only(planned({name: scheme(4)}, added_biases=frozenset({name})))
    assert "bias" in problem.message
    assert problem.linear == name


@pytest.mark.parametrize(
    "quantized", [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.gate_up", f"{LAYER}.mlp.gates.experts.0.w1"]
)
def test_quantized_linear_whose_name_begins_with_that_of_a_float_one_is_refused(
    quantized: str, planned: Planned, scheme: Scheme
) -> None:
    problem = only(planned({quantized: scheme(4), f"{LAYER}.mlp.gate": None}))
    assert f"begins with that of {LAYER}.mlp.gate," in problem.message
    assert problem.linear == quantized


def test_name_of_the_fused_linear_counts(planned: Planned, scheme: Scheme) -> None:
    # up_proj does not begin with gate; gate_up_proj, which vLLM makes of it, does.
    found = problems(planned({f"{LAYER}.mlp.up_proj": scheme(4)}, matrices=frozenset({f"{LAYER}.mlp.gate"})))
    assert [problem.linear for problem in found] == [f"{LAYER}.mlp.up_proj"]


def test_experts_are_warned_of_since_transformers_fuses_them(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.experts.0.up_proj": scheme(4), f"{LAYER}.mlp.experts.1.up_proj": scheme(4)})
    assert problems(model) == []
    assert "transformers" in only(model, fatal=False).message


def test_float32_is_warned_of(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({f"{LAYER}.mlp.up_proj": scheme(4)}, dtype="float32"), fatal=False)
    assert "float16" in problem.message
