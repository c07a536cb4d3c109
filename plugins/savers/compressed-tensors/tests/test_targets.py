# SPDX-License-Identifier: Apache-2.0
"""Patterns match exactly what they stand for, also under the names that engines give to layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from compressed_tensors.utils.match import match_name

from modelslim_compressed_tensors.targets import cover, matches

LAYERS = 12
LANGUAGE = [
    f"model.language_model.layers.{layer}.{part}"
    for layer in range(LAYERS)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate")
]
EXPERTS = [
    f"model.language_model.layers.{layer}.mlp.experts.{expert}.{part}"
    for layer in range(LAYERS)
    for expert in range(11)
    for part in ("up_proj", "down_proj")
]
VISION = [
    *(f"model.vision_tower.encoder.layers.{layer}.self_attn.q_proj" for layer in range(3)),
    "model.vision_tower.merger.fc1",
    "model.vision_tower.merger.mlp.0",
    "model.projector.fc1",
]
MODEL = ["lm_head", *LANGUAGE, *EXPERTS, *VISION]


def layer(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


SPLITS: Mapping[str, Iterable[str]] = {
    "a kind of linear": [name for name in LANGUAGE if "self_attn" in name],
    "all of the language": [*LANGUAGE, *EXPERTS],
    "one tower": VISION,
    "one of two towers that look alike": [name for name in LANGUAGE if name.endswith("q_proj")],
    "some layers": [name for name in LANGUAGE if layer(name) in (1, 11) and "mlp" in name],
    "experts of a layer": [name for name in EXPERTS if layer(name) == 1],
    "a single expert": [name for name in EXPERTS if ".layers.1.mlp.experts.1." in name],
    "what lies outside": ["lm_head", "model.vision_tower.merger.fc1"],
    "one of two equal ends": ["model.projector.fc1"],
    "another number": ["model.vision_tower.merger.mlp.0"],
}


@pytest.mark.parametrize("split", SPLITS)
def test_patterns_match_the_names_and_none_of_the_others(split: str) -> None:
    names = set(SPLITS[split])
    patterns = cover(names, set(MODEL) - names)
    matched = {name for name in MODEL if any(match_name(name, pattern) for pattern in patterns)}
    assert matched == names
    assert {name for name in MODEL if any(matches(name, pattern) for pattern in patterns)} == names
    assert len(patterns) <= 4 or split == "a single expert"
    assert patterns == cover(sorted(names, reverse=True), sorted(set(MODEL) - names))


def test_patterns_match_under_the_path_of_another_engine() -> None:
    (pattern,) = cover(EXPERTS, VISION)
    for prefix in ("", "model.", "language_model.model.", "thinker.model."):
        assert match_name(f"{prefix}layers.7.mlp.experts.3.up_proj", pattern)
    assert not match_name("model.sublayers.7.mlp.experts.3.up_proj", pattern)
    assert not match_name("model.layers.7.mlp.experts.3.up_proj.extra", pattern)


def test_siblings_share_a_pattern() -> None:
    names = [f"model.layers.{layer}.self_attn.{last}" for layer in range(3) for last in ("v_proj", "q_proj")]
    assert cover(names, ()) == [r"re:(?:.*\.)?layers\.\d+\.self_attn\.(?:q_proj|v_proj)$"]


def test_layers_are_named_where_others_have_another_scheme() -> None:
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (2, 10)]
    others = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 3, 12)]
    assert cover(names, others) == [r"re:(?:.*\.)?layers\.(?:2|10)\.mlp\.down_proj$"]


def test_special_characters_are_no_pattern() -> None:
    (pattern,) = cover(["a.b+c"], ())
    assert match_name("a.b+c", pattern) and not match_name("a.bbc", pattern)
