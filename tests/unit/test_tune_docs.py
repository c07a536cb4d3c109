# SPDX-License-Identifier: Apache-2.0
"""docs/analyze.md and docs/tune.md name every option, key, metric and default; the plan that is shown is a good one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from modelslim.analysis.run import SCOPES
from modelslim.registry import Registry
from modelslim.tune.experience import TABLE
from modelslim.tune.plan import read_tune_plan

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads(files("modelslim.schemas").joinpath("tune_plan.json").read_text(encoding="utf-8"))


def _keys(value: Any) -> Iterator[str]:
    """Every key that a schema declares, and every word of an enumeration."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == "properties" and isinstance(one, dict):
                yield from one
            if key == "enum":
                yield from one
            yield from _keys(one)
    elif isinstance(value, list):
        for one in value:
            yield from _keys(one)


@pytest.mark.parametrize("name", ["analyze", "tune"])
def test_every_option_is_documented(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    command = import_module(f"modelslim.cli.{name}").command
    options = [one for parameter in command.params for one in parameter.opts if one.startswith("--")]
    assert len(options) > 9
    assert [one for one in options if f"`{one}`" not in text] == []


def test_every_key_of_a_plan_is_documented() -> None:
    text = (DOCS / "tune.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[A-Za-z0-9_]+", text))
    assert sorted(set(_keys(SCHEMA)) - words) == []


def test_every_scope_metric_and_structure_is_documented() -> None:
    text = (DOCS / "analyze.md").read_text(encoding="utf-8")
    assert [one for scope, metrics in SCOPES.items() for one in (scope, *metrics) if f"`{one}`" not in text] == []
    tune = (DOCS / "tune.md").read_text(encoding="utf-8")
    assert [one for one in TABLE["w8a8"] if one not in tune] == []
    assert TABLE["w8a8"].keys() == TABLE["w4a8"].keys()


def test_the_plan_of_the_docs_is_a_good_one(tmp_path: Path) -> None:
    text = (DOCS / "tune.md").read_text(encoding="utf-8")
    file = tmp_path / "plan.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    plan = read_tune_plan(file, Registry.scan())
    assert (plan.strategy["bits_per_weight"], plan.strategy["sensitivity"], plan.max_trials) == (4.5, "kl", 30)
    assert (plan.evaluation["metric"], plan.evaluation["window"]) == ("kl", 512)
