# SPDX-License-Identifier: Apache-2.0
"""Which linears a pattern selects."""

from __future__ import annotations

import fnmatch
import random

import pytest

from modelslim.patterns import Selector, matches, matches_name
from modelslim.types import LinearInfo


def linear(name: str, unit: str = "model.layers.0", stored: str = "") -> LinearInfo:
    return LinearInfo(name, stored or name, unit, 8, 8, False, "bfloat16")


LAYERS = [
    linear(f"model.layers.{index}.{part}", f"model.layers.{index}")
    for index in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
HEAD = linear("lm_head", unit="")


def selected(
    include: list[str], exclude: list[str] | None = None, linears: list[LinearInfo] | None = None
) -> list[str]:
    chosen = Selector(include, exclude or []).select([*LAYERS, HEAD] if linears is None else linears)
    return [linear.name for linear in chosen]


def names(*parts: str) -> list[str]:
    return [linear.name for linear in LAYERS if any(part in linear.name for part in parts)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", names("")),
        ("*mlp*", names("mlp")),
        ("*.down_proj", names("down_proj")),
        ("*self_attn*", names("self_attn")),
        ("*.{q,o}_proj", names("q_proj", "o_proj")),
        ("model.layers.1.*", names(".1.")),
        ("model.layers.{0,10}.mlp.*", names(".0.mlp", ".10.mlp")),
        ("model.layers.{0..1}.*", names(".0.", ".1.")),
        ("model.layers.?.*", names(".0.", ".1.")),
        ("model.layers.[!0]*", names(".1.", ".10.")),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("down_proj", []),  # the whole name is meant, not a part of it
        ("*MLP*", []),  # case counts
        ("*.mlp", []),  # a module is not a linear
        ("", []),
    ],
)
def test_a_pattern_selects_by_the_whole_name(pattern: str, expected: list[str]) -> None:
    assert selected([pattern]) == expected


def test_patterns_without_braces_mean_what_the_shell_means() -> None:
    chance = random.Random(0)
    for _ in range(500):
        pattern = "".join(chance.choice(["*", "?", "m", "l", ".", "0", "_", "[0-1]", "mlp", "down"]) for _ in range(6))
        for name in names(""):
            if not any(sign in pattern for sign in "{}\\") and not pattern.startswith("."):
                assert matches_name(name, pattern) == fnmatch.fnmatchcase(name, pattern), (name, pattern)


def test_what_lies_outside_the_units_must_be_named_outright() -> None:
    assert not matches(HEAD, "*")
    assert not matches(HEAD, "*head")
    assert not matches(HEAD, "lm_*")
    assert matches(HEAD, "lm_head")
    assert matches(HEAD, "*lm_head")
    assert matches(HEAD, "{lm_head,*mlp*}")
    thinker = linear("thinker.lm_head", unit="")
    assert not matches(thinker, "thinker.*") and not matches(thinker, "lm_head")
    assert matches(thinker, "*.lm_head") and matches(thinker, "thinker.lm_head")


def test_the_name_in_the_checkpoint_counts_too() -> None:
    moved = linear("model.language_model.layers.0.mlp.up_proj", stored="model.layers.0.mlp.up_proj")
    assert matches(moved, "model.language_model.layers.*") and matches(moved, "model.layers.*")
    assert not matches(moved, "layers.*")
    head = linear("lm_head", unit="", stored="output")
    assert matches(head, "lm_head") and not matches(head, "output")


def test_exclude_wins_and_the_order_is_that_of_the_model() -> None:
    assert selected(["*mlp*", "*q_proj"], ["*down_proj", "*.10.*"]) == [
        name for name in names("mlp", "q_proj") if "down_proj" not in name and ".10." not in name
    ]
    assert selected(["*"], ["*"]) == []
    assert selected([]) == []
    assert selected(["*", "lm_head"], ["lm_head"]) == names("")
    assert selected(["lm_head"], ["*"]) == ["lm_head"]  # which leaves it alone, here as there


def test_every_pattern_knows_its_place_in_the_configuration() -> None:
    assert Selector(["a", "b"], ["c"]).patterns() == [
        (("include", 0), "a"),
        (("include", 1), "b"),
        (("exclude", 0), "c"),
    ]
