# SPDX-License-Identifier: Apache-2.0
"""One click: ``--quant_type`` and ``--tag`` as the quick guide prints them, on a terminal and without one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelslim.cli.options import _with_tags_apart

Program = Callable[..., subprocess.CompletedProcess[str]]
Terminal = Callable[..., tuple[int, str]]
MEASURED = "SmolLM2-135M-Instruct"
SHORT = ("--device", "cpu", "--calib_samples", "2", "--calib_length", "16")
MINE = """\
apiversion: modelslim_v1
metadata:
  config_id: mine
  label: {{w_bit: 8, a_bit: 8}}
  verified_tags:
    MyModel-7B: [[{tags}]]
spec:
  process:
    - type: linear_quant
      qconfig: {{act: {{scope: per_token}}, weight: {{dtype: int8}}}}
  save: [{{type: ascendv1_saver}}]
"""


@pytest.fixture
def paths(tiny_llama: Path, tmp_path: Path) -> tuple[str | Path, ...]:
    """Options for the model and the result."""
    return ("--model_path", tiny_llama, "--save_path", tmp_path / "out")


def test_a_practice_that_is_verified_is_taken_at_once(
    here: Program, paths: tuple[str | Path, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    done = here("quant", *paths, *SHORT, "--model_type", MEASURED, "--quant_type", "W8A8")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "chosen because" in line]
    assert len(said) == 1
    assert f"w8a8 was asked for and it is verified for {MEASURED} [priority 1 of 6]" in said[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    practice = report["practice"]
    assert (practice["config_id"], practice["priority"], practice["evidence"]) == ("default_w8a8", 1, "measured")
    assert practice["chosen_because"] in said[0]
    assert (report["samples"], report["calib_length"]) == (2, 16)
    copy = tmp_path / "out" / f"{MEASURED}_best_practice.yaml"
    assert copy.name == practice["copy"]
    text = copy.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# {said[0]}"
    assert yaml.safe_load(text) == yaml.safe_load(Path(practice["file"]).read_text(encoding="utf-8"))
    # The copy is a protocol like any other, and gives the same weights.
    again = ("--model_path", tiny_llama, "--save_path", tmp_path / "again", "--config_path", copy, *SHORT)
    assert here("quant", *again).returncode == 0
    weights = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1] or pytest.fail("the weights differ")


def test_without_a_terminal_and_without_yes_nothing_is_done(
    here: Program, paths: tuple[str | Path, ...], tmp_path: Path
) -> None:
    words = ("quant", *paths, *SHORT, "--model_type", "Qwen2.5-7B-Instruct", "--quant_type", "w8a8")
    done = here(*words)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert "default_w8a8" in done.stderr and "its accuracy on Qwen2.5-7B-Instruct is not known" in done.stderr
    assert "[priority 3 of 6]" in done.stderr and "--yes takes it" in done.stderr
    assert done.stderr.count("chosen because") == 1
    done = here(*words, "--yes")
    assert done.returncode == 0, done.stderr
    assert "taken because of --yes" in done.stderr
    assert (tmp_path / "out" / "Qwen2.5-7B-Instruct_best_practice.yaml").exists()


def test_a_slip_in_the_name_is_told_once_before_anything_is_done(
    here: Program, paths: tuple[str | Path, ...], tmp_path: Path
) -> None:
    words = ("quant", *paths, *SHORT, "--model_type", "SmolLM2-135M-Instrct", "--quant_type", "w8a16")
    done = here(*words)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "did you mean 'SmolLM2-135M-Instruct'?" in done.stderr
    done = here(*words, "--yes")
    assert done.returncode == 0
    assert done.stderr.count("did you mean") == done.stderr.count("no adapter is registered") == 1


def test_no_type_at_all_is_a_question_about_w8a8(here: Program, paths: tuple[str | Path, ...], tmp_path: Path) -> None:
    words = ("quant", *paths, *SHORT, "--model_type", MEASURED)
    done = here(*words)
    assert done.returncode == 2 and "no --quant_type was given, w8a8 is what is recommended" in done.stderr
    assert here(*words, "--yes", "--quiet").returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["practice"]["quant_type"], report["schemes"]) == (None, {"W8A8_DYNAMIC": 21})


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2), ("\n", 2)])
def test_the_guides_first_example_on_a_terminal(
    answer: str, code: int, paths: tuple[str | Path, ...], tmp_path: Path, terminal: Terminal
) -> None:
    model = ("--model_type", "Qwen2.5-7B-Instruct", "--quant_type", "w8a8", "--trust_remote_code", "True")
    found, said = terminal(answer, "quant", *paths, *SHORT, *model)
    assert found == code, said
    assert said.count("chosen because") == 1 and "Take this practice? [y/N]" in said
    assert (tmp_path / "out" / "report.json").exists() is (code == 0)
    assert ("the practice was not taken" in said) is (code == 2)


def test_two_ways_to_say_the_protocol_are_one_error(
    here: Program, paths: tuple[str | Path, ...], protocol: Callable[[str], Path], w8a16: str
) -> None:
    both = ("--config_path", protocol(w8a16), "--quant_type", "w8a8")
    for words in (("quant", *paths), ("plan", *paths[:2])):
        done = here(*words, *both)
        assert done.returncode == 2
        assert "--config_path and --quant_type exclude each other" in done.stderr


def test_tags_have_no_effect_beside_a_protocol_and_it_is_said(
    here: Program, paths: tuple[str | Path, ...], protocol: Callable[[str], Path], w8a16: str
) -> None:
    done = here("plan", *paths[:2], "--device", "cpu", "--config_path", protocol(w8a16), "--tag", "vLLM", "--json")
    assert "--tag has no effect beside --config_path" in done.stderr
    assert json.loads(done.stdout)["practice"] is None


@pytest.mark.parametrize(
    ("tags", "engine", "config_id"),
    [
        (("--tag", "vLLM-Ascend", "Atlas_A2_Inference"), "vllm-ascend", "default_w8a16"),
        (("--tag=vllm_ascend", "atlas-a2-inference"), "vllm-ascend", "default_w8a16"),
        (("--tag", "vllm"), "vllm-0", "default_w8a16_compressed"),
        (("--tag", "Transformers", "--tag", "cpu"), "transformers", "default_w8a16_compressed"),
        (("--tag", "vLLM", "--engine", "vllm-ascend-0.23"), "vllm-ascend-0.23.0", "default_w8a16"),
        (("--tag", "SGLang"), "sglang", "default_w8a16"),
    ],
)
def test_a_tag_names_the_engine_that_the_plan_checks(
    tags: tuple[str, ...], engine: str, config_id: str, here: Program, paths: tuple[str | Path, ...]
) -> None:
    words = ("--model_type", MEASURED, "--quant_type", "w8a16", *tags, "--device", "cpu", "--json")
    done = here("plan", *paths[:2], *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["engine"].startswith(engine) and plan["practice"]["config_id"] == config_id
    # It was measured, in no scenario in particular: the plan says that quant will ask.
    assert plan["practice"]["priority"] == 2 and "quant asks for consent" in done.stderr


def test_what_the_tagged_engine_cannot_load_is_refused(here: Program, paths: tuple[str | Path, ...]) -> None:
    words = ("--quant_type", "w4a16", "--tag", "vLLM-Ascend", "--device", "cpu")
    done = here("plan", *paths[:2], *words)
    assert done.returncode == 2
    assert "vLLM-Ascend runs W4A16 for experts only" in done.stderr


def test_practices_of_ones_own(here: Program, paths: tuple[str | Path, ...], tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text(MINE.format(tags="vLLM_Ascend, Atlas_A2_Inference"), encoding="utf-8")
    (folder / "broken.yaml").write_text("apiversion: modelslim_v1\nmetadata: {scores: 1}\n", encoding="utf-8")
    model = ("--model_type", "MyModel-7B", "--quant_type", "w8a8", "--tag", "vLLM-Ascend", "atlas-a2_inference")
    words = ("quant", *paths, "--device", "cpu", *model)
    done = here(*words, "--practices", folder)
    assert done.returncode == 0, done.stderr
    assert f"practice mine ({folder}), chosen because w8a8 was asked for and it is verified" in done.stderr
    assert "broken.yaml is no practice: metadata: " in done.stderr and "'scores' was unexpected" in done.stderr
    monkeypatch.setenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", str(folder))
    value = json.loads(here("practices", "why", "--json", *paths[:2], *model).stdout)
    assert (value["chosen"]["config_id"], value["needs_consent"]) == ("mine", False)
    listed = json.loads(here("practices", "--json").stdout)["practices"]
    assert [one["config_id"] for one in listed[:2]] == ["broken", "mine"] and listed[0]["problem"]
    assert here("practices", "list", "--json").stdout == here("practices", "--json").stdout
    text = here("practices", "show", "mine").stdout
    assert text == (folder / "mine.yaml").read_text(encoding="utf-8")
    assert json.loads(here("practices", "show", "mine", "--json").stdout)["yaml"] == text
    people = here("practices").stdout
    assert "default_w8a8" in people and "mine" in people
    missing = here("practices", "show", "mien")
    assert missing.returncode == 2 and "did you mean 'mine'?" in missing.stderr


def test_why_goes_through_the_priorities(here: Program) -> None:
    words = ("practices", "why", "--model_type", "DeepSeek-R1", "--quant_type", "w8a8f8", "--tag", "vLLM-Ascend")
    value = json.loads(here(*words, "--json").stdout)
    assert [one["priority"] for one in value["priorities"]] == [1, 2, 3, 4, 5, 6]
    assert [bool(one["found"]) for one in value["priorities"]] == [False] * 5 + [True]
    assert value["chosen"]["config_id"] == value["priorities"][5]["found"][0] == "deepseek_v3_w8a8_dynamic"
    assert value["lacking"] == "no algorithm here quantizes attention itself" and value["needs_consent"] is True
    people = here(*words)
    assert people.returncode == 0
    assert "w8a8f8: no algorithm here quantizes attention itself" in people.stdout
    assert value["line"] in people.stdout


def test_typical_slips_get_the_nearest_right_thing(here: Program, paths: tuple[str | Path, ...]) -> None:
    for words, answer in (
        (("--quant_type", "w8a"), "did you mean 'w8a8'?"),
        (("--quant_type", "w8a8", "--tag", "MindIE", "vLLM"), "--tag names 2 engines"),
        (("--quant_type", "w8a8", "--engine", "vlm"), "did you mean 'vllm'?"),
        (("--quant_type", "w8a8", "--practices", "nowhere"), "nowhere, which is no folder"),
        (("--quant_typ", "w8a8"), "--quant_type"),
    ):
        done = here("plan", *paths[:2], *words)
        assert done.returncode == 2 and answer in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tag", "a", "b", "--yes"], ["--tag", "a", "--tag", "b", "--yes"]),
        (["--tag=a", "b", "c"], ["--tag=a", "--tag", "b", "--tag", "c"]),
        (["--tag", "a", "--tag", "b"], ["--tag", "a", "--tag", "b"]),
        (["--yes", "x", "--tag", "a"], ["--yes", "x", "--tag", "a"]),
        (["--tag", "--yes"], ["--tag", "--yes"]),
    ],
)
def test_a_tag_takes_all_words_up_to_the_next_option(given: list[str], expected: list[str]) -> None:
    assert list(_with_tags_apart(given)) == expected


def test_ranks_share_a_practice_and_its_limits(program: Program, paths: tuple[str | Path, ...], tmp_path: Path) -> None:
    words = ("--model_type", MEASURED, "--quant_type", "w8a8", "--workers", "2", "--calib_samples", "4")
    done = program("quant", *paths, *words, "--calib_length", "16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("chosen because") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["practice"]["config_id"], report["samples"], report["calib_length"]) == ("default_w8a8", 4, 16)
