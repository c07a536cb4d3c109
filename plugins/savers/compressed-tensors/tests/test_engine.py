# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors package itself parses what is written, and its refusal is passed on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelslim_compressed_tensors.engine import check_config

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
CONFIG = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP}}


@pytest.fixture
def check(tmp_path: Path) -> Callable[[Any], list[str]]:
    def run(content: Any) -> list[str]:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"quantization_config": content}), encoding="utf-8")
        return [problem.message for problem in check_config(file)]

    return run


def test_package_accepts_what_it_knows(check: Callable[[Any], list[str]]) -> None:
    assert check(CONFIG) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": {**GROUP["weights"], "strategy": "chanel"}}, "chanel"),
        ({"weights": {**GROUP["weights"], "strategy": "group"}}, "group_size"),
        ({"weihgts": GROUP["weights"]}, "weihgts"),
    ],
)
def test_refusal_of_the_package_is_passed_on(
    change: dict[str, Any], says: str, check: Callable[[Any], list[str]]
) -> None:
    (message,) = check({**CONFIG, "config_groups": {"group_0": {**GROUP, **change}}})
    assert "refuses quantization_config" in message and says in message


def test_without_the_package_nothing_is_said(
    check: Callable[[Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelslim_compressed_tensors.engine.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    assert check({**CONFIG, "config_groups": {"group_0": {}}}) == []
