# SPDX-License-Identifier: Apache-2.0
"""Every family in every scheme, on tiny random checkpoints; the table of docs/models.md comes from these runs."""

from __future__ import annotations

import pytest
import torch
from cells import FamilyRun
from checkpoints import ROOT
from families import FAMILIES
from schemes import SCHEMES
from table import render

Runs = dict[str, FamilyRun]
# The processor of GLM-4.xV asks numpy 2 for an array in a way that it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_by_unit_is_the_whole_forward_to_the_bit(family: str, runs: Runs) -> None:
    run = runs[family]
    assert len(run.whole) > 1
    for number, (actual, expected) in enumerate(zip(run.unit_wise, run.whole, strict=True)):
        assert torch.equal(actual, expected), number


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_keeps_the_rules_and_runs(family: str, scheme: str, runs: Runs) -> None:
    assert runs[family].cell(scheme).problems == []


def test_the_documented_table_is_what_the_runs_give(runs: Runs, request: pytest.FixtureRequest) -> None:
    file, text = ROOT / "docs" / "models.md", render(runs)
    if request.config.getoption("--write-models", default=False):
        file.write_text(text, encoding="utf-8")
    different = [
        (line, wanted)
        for line, wanted in zip(file.read_text(encoding="utf-8").split("\n"), text.split("\n"), strict=False)
        if line != wanted
    ]
    assert different[:1] == [], "rewrite it with: pytest tests/models --write-models"
    assert len(file.read_text(encoding="utf-8")) == len(text)
