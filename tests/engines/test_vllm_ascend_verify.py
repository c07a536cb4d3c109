# SPDX-License-Identifier: Apache-2.0
"""`verify --engine vllm-ascend` asks the scheme classes of the engine, and agrees with what the engine loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Quantize, TinyFactory, run_in_engine
from test_vllm_ascend_types import EXPERTS, LINEARS, REFUSED

Ask = Callable[..., Mapping[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """``ask({name: directory}, bare=...)`` -> what ``verify`` finds in each, by name."""

    def run(models: Mapping[str, Path], *, bare: bool = False) -> Mapping[str, Any]:
        place = tmp_path_factory.mktemp("verify")
        job = {"bare": bare, "models": {name: str(path) for name, path in models.items()}}
        (place / "job.json").write_text(json.dumps({**job, "result": str(place / "found.json")}), encoding="utf-8")
        log = run_in_engine(Path(__file__).with_name("verify_run.py"), place / "job.json")
        assert (place / "found.json").exists(), log[-4000:]
        found: Mapping[str, Any] = json.loads((place / "found.json").read_text(encoding="utf-8"))
        return found

    return run


@pytest.fixture(scope="module")
def models(tiny_qwen2: TinyFactory, tiny_qwen3_moe: Path, quantize: Quantize) -> Mapping[str, Path]:
    """Every type that the engine loads, in linears and in experts, and what it refuses."""
    made = {type_: quantize(tiny_qwen2("bfloat16"), "ascendv1_saver", one) for type_, one in LINEARS.items()}
    for type_, (outside, inside) in EXPERTS.items():
        made[f"{type_} experts"] = quantize(tiny_qwen3_moe, "ascendv1_saver", outside, experts=inside)
    for name, (outside, experts) in REFUSED.items():
        inside = experts or LINEARS["W8A8_DYNAMIC"]
        made[f"refused {name}"] = quantize(tiny_qwen3_moe, "ascendv1_saver", outside, experts=inside)
    return made


@pytest.fixture(scope="module")
def found(models: Mapping[str, Path], ask: Ask) -> Mapping[str, Any]:
    """What was found in each."""
    return ask(models)


@pytest.mark.parametrize("name", [*LINEARS, *(f"{type_} experts" for type_ in EXPERTS)])
def test_what_the_engine_loads_has_no_fault(name: str, found: Mapping[str, Any]) -> None:
    one = found[name]
    assert one["asked"].startswith("vllm-ascend 0.") and one["by_contract"] == ""
    assert [problem["message"] for problem in one["problems"] if problem["fatal"]] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_load_is_refused_by_the_engine_itself(name: str, found: Mapping[str, Any]) -> None:
    one = found[f"refused {name}"]
    messages = [problem["message"] for problem in one["problems"] if problem["fatal"]]
    # It has a class for dense W4A8_DYNAMIC, which takes weights in groups only.
    says = "cannot make model.layers" if name == "W4A8_DYNAMIC" else f"has no class for {name.split()[0]}"
    assert any(message.startswith(f"{one['asked']} {says}") for message in messages), messages


def test_without_an_npu_the_contract_is_checked_only(models: Mapping[str, Path], ask: Ask) -> None:
    one = ask({"W8A8": models["W8A8"]}, bare=True)["W8A8"]
    assert (one["asked"], one["good"]) == ("", True)
    assert one["by_contract"] == "vllm_ascend cannot be imported: No module named 'torch_npu'"
