# SPDX-License-Identifier: Apache-2.0
"""What is refused before a weight is read, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelslim.api import PlannedModel, Problem, QuantSpec
from modelslim_gptq.saver import GptqSaver

Planned = Callable[..., PlannedModel]
Scheme = Callable[..., QuantSpec]
LAYER = "model.layers.0"


def problems(model: PlannedModel, fatal: bool = True) -> list[Problem]:
    found = [problem for problem in GptqSaver().check(model) if problem.fatal == fatal]
    assert all(problem.hint for problem in found)
    return found


def only(model: PlannedModel, fatal: bool = True) -> Problem:
    (problem,) = problems(model, fatal)
    return problem


def test_plain_model_has_no_problem(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.up_proj": scheme(4, 32), f"{LAYER}.mlp.down_proj": None, "lm_head": None})
    assert GptqSaver().check(model) == []


def test_two_schemes_are_refused(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({f"{LAYER}.mlp.up_proj": scheme(4, 32), f"{LAYER}.mlp.down_proj": scheme(8)}))
    assert "one scheme for the whole model, and there are 2" in problem.message
    assert "W4A16 (weight per_group 32)" in problem.message
    assert problem.linear == f"{LAYER}.mlp.down_proj"


@pytest.mark.parametrize(("shape", "words"), [((64, 60), "60 inputs"), ((60, 64), "60 outputs")])
def test_words_that_are_not_full_are_refused(
    shape: tuple[int, int], words: str, planned: Planned, scheme: Scheme
) -> None:
    name = f"{LAYER}.mlp.up_proj"
    assert words in only(planned({name: scheme(4)}, shapes={name: shape})).message
    assert problems(planned({name: scheme(8)}, shapes={name: shape})) == []


def test_bias_that_smoothing_adds_is_refused(planned: Planned, scheme: Scheme) -> None:
    name = f"{LAYER}.mlp.up_proj"
    problem = only(planned({name: scheme(4)}, added_biases=frozenset({name})))
    assert "bias" in problem.message
    assert problem.linear == name


def test_tied_head_is_refused(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({"lm_head": scheme(4)}, config={"tie_word_embeddings": True}))
    assert problem.linear == "lm_head"


def test_float_linear_whose_name_begins_with_that_of_a_quantized_one_is_refused(
    planned: Planned, scheme: Scheme
) -> None:
    problem = only(planned({f"{LAYER}.mlp.gate": scheme(4), f"{LAYER}.mlp.gate_proj": None}))
    assert f"{LAYER}.mlp.gate_proj, which stays float" in problem.message
    assert problem.linear == f"{LAYER}.mlp.gate"


def test_experts_are_warned_of_since_transformers_fuses_them(planned: Planned, scheme: Scheme) -> None:
    model = planned({f"{LAYER}.mlp.experts.0.up_proj": scheme(4), f"{LAYER}.mlp.experts.1.up_proj": scheme(4)})
    assert problems(model) == []
    assert "transformers" in only(model, fatal=False).message


def test_float32_is_warned_of(planned: Planned, scheme: Scheme) -> None:
    problem = only(planned({f"{LAYER}.mlp.up_proj": scheme(4)}, dtype="float32"), fatal=False)
    assert "float16" in problem.message
