# SPDX-License-Identifier: Apache-2.0
"""Typical mistakes of a newcomer: each costs one correction, which the error names and which then works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Program = Callable[..., subprocess.CompletedProcess[str]]

STATIC = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: False, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset: calibration.jsonl
"""
BLOCK = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        weight:
          scope: per_channel
          dtype: int8
          symmetric: true
      include: ["*"]
  save:
    - type: ascendv1_saver
"""
GROUPED = BLOCK.replace("scope: per_channel", "scope: per_group\n          group_size: 32")


@dataclass(frozen=True)
class Mistake:
    """A command line with a mistake.

    Attributes:
        words: the command line; ``{folder}`` holds the model, the protocols and what else a case needs.
        place: what the error must name.
        right: what its hint must offer.
        then: the command line with the hint obeyed; empty where that is no command of ours.
    """

    words: str
    place: str
    right: str
    then: str = ""


PLAN = "plan --model_path {folder}/model --device cpu"
GOOD = "--config_path {folder}/good.yaml"
QUANT = "quant --model_path {folder}/model --save_path {folder}/out --device cpu"
MEASURED = "--model_type SmolLM2-135M-Instruct"
SHORT = "--calib_samples 1 --calib_length 8"

COMMAND_LINES = {
    "command": Mistake(f"plam --model_path {{folder}}/model {GOOD}", "'plam'", "'plan'", f"{PLAN} {GOOD}"),
    "command that is the library's name": Mistake("quantize --model_path {folder}/model", "'quantize'", "'quant'"),
    "command forgotten": Mistake(
        f"--model_path {{folder}}/model {GOOD}", "'--model_path'", "quant --model_path", f"{QUANT} {GOOD}"
    ),
    "option missing": Mistake(
        f"quant --model_path {{folder}}/model {GOOD}", "'--save_path'", "add --save_path PATH", f"{QUANT} {GOOD}"
    ),
    "option misspelt": Mistake(
        f"{PLAN} --quant_typ w8a8", "'--quant_typ'", "did you mean '--quant_type'?", f"{PLAN} --quant_type w8a8"
    ),
    "option of other programs": Mistake(
        f"quant --model_path {{folder}}/model --output_dir {{folder}}/out {GOOD}",
        "'--output_dir'",
        "did you mean '--save_path'?",
        f"{QUANT} {GOOD}",
    ),
    "one hyphen": Mistake(
        f"plan -model_path {{folder}}/model {GOOD}", "'-model_path'", "did you mean '--model_path'?", f"{PLAN} {GOOD}"
    ),
    "value without its option": Mistake(
        f"plan {{folder}}/model {GOOD}", "'--model_path'", "add --model_path PATH", f"{PLAN} {GOOD}"
    ),
    "value too many": Mistake(
        f"{PLAN} {GOOD} {{folder}}/out", "{folder}/out", "every value has its option in front", f"{PLAN} {GOOD}"
    ),
    "option without its value": Mistake(
        f"{PLAN} {GOOD} --trust_remote_code",
        "'--trust_remote_code'",
        "write --trust_remote_code True",
        f"{PLAN} {GOOD} --trust_remote_code True",
    ),
    "another option for a value": Mistake(
        f"{PLAN} --trust_remote_code {GOOD}",
        "'--trust_remote_code'",
        "write --trust_remote_code True",
        f"{PLAN} --trust_remote_code True {GOOD}",
    ),
    "value not offered": Mistake(
        f"{PLAN} {GOOD} --trust_remote_code yes",
        "'yes'",
        "write --trust_remote_code True",
        f"{PLAN} {GOOD} --trust_remote_code True",
    ),
    "number in words": Mistake(f"{PLAN} {GOOD} --workers two", "'two'", "--workers 1", f"{PLAN} {GOOD} --workers 1"),
    "number too small": Mistake(
        f"{PLAN} {GOOD} --calib_samples 0", "'--calib_samples'", "--calib_samples 1", f"{PLAN} {GOOD} --calib_samples 1"
    ),
    "quant_type misspelt": Mistake(
        f"{PLAN} --quant_type w8-a8", "--quant_type 'w8-a8'", "did you mean 'w8a8'?", f"{PLAN} --quant_type w8a8"
    ),
    "quant_type a dtype": Mistake(
        f"{PLAN} --quant_type int8", "--quant_type 'int8'", "w8a16 the weights alone", f"{PLAN} --quant_type w8a16"
    ),
    "both protocol and type": Mistake(
        f"{PLAN} {GOOD} --quant_type w8a8", "--config_path and --quant_type", "leave one of them out", f"{PLAN} {GOOD}"
    ),
    "model misspelt": Mistake(
        f"plan --model_path {{folder}}/modle {GOOD}",
        "'{folder}/modle' does not exist",
        "did you mean '{folder}/model'?",
        f"{PLAN} {GOOD}",
    ),
    "model a name on a hub": Mistake(
        f"plan --model_path Qwen/Qwen2.5-7B-Instruct {GOOD}",
        "'Qwen/Qwen2.5-7B-Instruct' does not exist",
        "download the model first and give its folder",
    ),
    "model a file": Mistake(
        f"plan --model_path {{folder}}/model/model.safetensors {GOOD}",
        "'--model_path'",
        "give the folder that holds it: {folder}/model",
        f"{PLAN} {GOOD}",
    ),
    "model a GGUF file": Mistake(
        f"plan --model_path {{folder}}/gguf/model-q4_k_m.gguf {GOOD}", "model-q4_k_m.gguf", "folder of the float model"
    ),
    "model a folder with a GGUF": Mistake(
        "plan --model_path {folder}/gguf --quant_type w8a8", "{folder}/gguf/config.json", "folder of the float model"
    ),
    "model a LoRA": Mistake(
        f"plan --model_path {{folder}}/lora {GOOD}", "{folder}/lora/config.json", "merge it into its base model"
    ),
    "model one folder up": Mistake(
        "plan --model_path {folder} --quant_type w8a8",
        "{folder}/config.json: no such file",
        "did you mean '{folder}/model'?",
        "plan --model_path {folder}/model --quant_type w8a8",
    ),
    "save_path not empty": Mistake(
        f"quant --model_path {{folder}}/model --save_path {{folder}}/full --device cpu {GOOD}",
        "--save_path {folder}/full is not empty",
        "such as {folder}/full_2",
        f"quant --model_path {{folder}}/model --save_path {{folder}}/full_2 --device cpu {GOOD}",
    ),
    "save_path the model": Mistake(
        f"quant --model_path {{folder}}/model --save_path {{folder}}/model --device cpu {GOOD}",
        "--save_path {folder}/model",
        "such as {folder}/model_2",
        f"quant --model_path {{folder}}/model --save_path {{folder}}/model_2 --device cpu {GOOD}",
    ),
    "protocol misspelt": Mistake(
        f"{PLAN} --config_path {{folder}}/god.yaml", "{folder}/god.yaml", "'{folder}/good.yaml'", f"{PLAN} {GOOD}"
    ),
    "protocol a folder": Mistake(
        f"{PLAN} --config_path {{folder}}/recipes",
        "{folder}/recipes",
        "{folder}/recipes/w8a8.yaml",
        f"{PLAN} --config_path {{folder}}/recipes/w8a8.yaml",
    ),
    "protocol a practice": Mistake(
        f"{PLAN} --config_path default_w8a8",
        "'default_w8a8'",
        "modelslim practices show NAME",
        "practices show default_w8a8",
    ),
    "device of another name": Mistake(
        f"plan --model_path {{folder}}/model {GOOD} --device gpu",
        "--device 'gpu'",
        "did you mean 'cuda'? write cpu",
        f"{PLAN} {GOOD}",
    ),
    "device misspelt": Mistake(
        f"plan --model_path {{folder}}/model {GOOD} --device cpuu",
        "--device 'cpuu'",
        "did you mean 'cpu'?",
        f"{PLAN} {GOOD}",
    ),
    "engine misspelt": Mistake(
        f"{PLAN} {GOOD} --engine vlm-ascend",
        "engine 'vlm-ascend'",
        "did you mean 'vllm-ascend'?",
        f"{PLAN} {GOOD} --engine vllm-ascend",
    ),
    "engine of another format": Mistake(
        f"{PLAN} {GOOD} --engine vllm",
        "good.yaml:10:7: spec.save[0]: vLLM does not read what ascendv1_saver writes",
        "compressed_tensors_saver",
        f"{PLAN} --config_path {{folder}}/compressed.yaml --engine vllm",
    ),
    "two engines": Mistake(
        f"{PLAN} --quant_type w8a8 --tag vLLM-Ascend MindIE",
        "--tag names 2 engines: vLLM-Ascend, MindIE",
        "keep vLLM-Ascend",
        f"{PLAN} --quant_type w8a8 --tag vLLM-Ascend",
    ),
    "tag misspelt": Mistake(
        f"{QUANT} {MEASURED} --quant_type w8a8 --tag vLLM-Ascned {SHORT}",
        "with vLLM-Ascned",
        "did you mean 'vllm-ascend'?",
        f"{PLAN} {MEASURED} --quant_type w8a8 --tag vllm-ascend",
    ),
    "model_type misspelt": Mistake(
        f"{QUANT} --model_type SmolLM2-135M-Instuct --quant_type w8a8 {SHORT}",
        "SmolLM2-135M-Instuct",
        "did you mean 'SmolLM2-135M-Instruct'?",
        f"{QUANT} {MEASURED} --quant_type w8a8 {SHORT}",
    ),
    "nobody to ask": Mistake(
        f"{QUANT} --quant_type w8a8 {SHORT}",
        "this needs a confirmation, and there is no terminal",
        "--yes takes it",
        f"{QUANT} --quant_type w8a8 --yes {SHORT}",
    ),
    "practices in no folder": Mistake(
        f"{PLAN} --quant_type w8a8 --practices {{folder}}/none",
        "--practices names {folder}/none",
        "a folder with YAML files",
        f"{PLAN} --quant_type w8a8 --practices {{folder}}/recipes",
    ),
    "memory without a unit": Mistake(
        f"{PLAN} {GOOD} --max_memory 24",
        "--max_memory '24'",
        "did you mean 24GiB?",
        f"{PLAN} {GOOD} --max_memory 24GiB",
    ),
    "memory in words": Mistake(
        f"{PLAN} {GOOD} --max_memory plenty",
        "'plenty' is not a size",
        "as in 24GiB",
        f"{PLAN} {GOOD} --max_memory 24GiB",
    ),
    "option of quant at verify": Mistake(
        "verify --model_path {folder}/model", "'--model_path'", "PATH stands without an option"
    ),
    "result misspelt": Mistake("verify {folder}/modle", "{folder}/modle", "did you mean '{folder}/model'?"),
}


@dataclass(frozen=True)
class Slip:
    """A protocol with a mistake.

    Attributes:
        good: the protocol without it.
        old: what stands there in the right one.
        new: what a newcomer writes.
        place: line, column and path that the error must name.
        right: what its hint must offer.
    """

    good: str
    old: str
    new: str
    place: str
    right: str


YAML = {
    "tab": Slip(BLOCK, "      qconfig:", "\tqconfig:", ":5:1: the line is indented with a tab", "indent with spaces"),
    "equals": Slip(BLOCK, "dtype: int8", 'dtype="int8"', ":8:11: ", 'YAML wants dtype: "int8"'),
    "no blank": Slip(STATIC, "dtype: int8, symmetric: False", "dtype:int8, symmetric: False", ":6:34: ", "dtype: int8"),
    "indented less": Slip(BLOCK, "      include", "    include", ":10:5: a key cannot", "indent it like the lines"),
    "indented by one less": Slip(BLOCK, "      include", "     include", ":10:6: ", "begin in column 5"),
    "setting outside spec": Slip(
        STATIC, "  dataset: calib", "dataset: calib", ":12:1: dataset: key 'dataset' has no effect", "below spec"
    ),
    "boolean in quotes": Slip(STATIC, "symmetric: False", "symmetric: 'False'", ":6:58: ", "write false, without"),
    "boolean in words": Slip(BLOCK, "symmetric: true", "symmetric: yes", ":9:22: ", "write true, without quotes"),
    "number in quotes": Slip(GROUPED, "group_size: 32", 'group_size: "32"', ":8:23: ", "write 32, without quotes"),
    "number with a unit": Slip(
        STATIC, "part_file_size: 4", "part_file_size: 4GB", ":11:23: ", "write 4, without a unit"
    ),
    "dtype a number": Slip(BLOCK, "dtype: int8", "dtype: 8", ":8:18: ", "int8"),
    "dtype misspelt": Slip(BLOCK, "dtype: int8", "dtype: in8", ":8:18: ", "did you mean 'int8'?"),
    "scope misspelt": Slip(BLOCK, "per_channel", "per-channel", ":7:18: ", "did you mean 'per_channel'?"),
    "processor misspelt": Slip(BLOCK, "linear_quant", "linear_qaunt", ":4:13: ", "did you mean 'linear_quant'?"),
    "processor as a class": Slip(BLOCK, "linear_quant", "LinearQuant", ":4:13: ", "did you mean 'linear_quant'?"),
    "saver misspelt": Slip(BLOCK, "ascendv1_saver", "ascend_v1", ":12:13: ", "did you mean 'ascendv1_saver'?"),
    "saver as a processor": Slip(BLOCK, "linear_quant", "ascendv1_saver", ":4:13: ", "belongs under save"),
    "key misspelt": Slip(BLOCK, "include", "inlcude", ":10:7: ", "did you mean 'include'?"),
    "key forgotten": Slip(BLOCK, '      include: ["*"]\n  save:', '      include: ["*"]\n  sav:', ":11:3: ", "'save'"),
    "apiversion misspelt": Slip(BLOCK, "modelslim_v1", "modelslim_v2", ":1:13: ", "did you mean 'modelslim_v1'?"),
    "runner misspelt": Slip(BLOCK, "spec:", "spec:\n  runner: layerwise", ":3:11: ", "did you mean 'layer_wise'?"),
    "pattern not a list": Slip(BLOCK, '["*"]', '"*"', ":10:16: ", 'write a list: ["*"]'),
    "pattern without quotes": Slip(BLOCK, '["*"]', "*", ":10:16: ", 'write "*"'),
    "pattern misspelt": Slip(BLOCK, '["*"]', '["*", "*dwon_proj"]', ":10:22: ", "did you mean 'down_proj'?"),
    "pattern without a star": Slip(
        BLOCK, '["*down_proj"]', '["down_proj"]', ":10:17: spec.process[0].include[0]", "did you mean '*down_proj'?"
    ),
    "pattern a regular expression": Slip(
        BLOCK, '["*down_proj"]', '[".*down_proj$"]', ":10:17: ", "did you mean '*down_proj'? Patterns are no regular"
    ),
    "group size that does not divide": Slip(
        GROUPED, "group_size: 32", "group_size: 48", ":7:11: spec.process[0].qconfig.weight: group_size 48", "32"
    ),
    "group size without a scope": Slip(
        BLOCK, "          dtype", "          group_size: 32\n          dtype", ":8:23: ", 'scope: "per_group"'
    ),
    "dataset misspelt": Slip(
        STATIC, "calibration.jsonl", "mix_calb.jsonl", ":12:12: spec.dataset", "did you mean 'mix_calib.jsonl'?"
    ),
    "smoothing behind quantizing": Slip(
        BLOCK, "  save:", "    - type: iter_smooth\n  save:", ":11:7: spec.process[1]", "in front of what quantizes"
    ),
}


TOGETHER = [
    ("processor misspelt", "key misspelt"),
    ("processor misspelt", "scope misspelt"),
    ("processor as a class", "pattern not a list"),
    ("processor misspelt", "pattern misspelt"),
    ("saver misspelt", "pattern misspelt"),
    ("apiversion misspelt", "key misspelt"),
    ("apiversion misspelt", "processor misspelt"),
    ("pattern not a list", "key misspelt"),
    ("dtype misspelt", "pattern misspelt"),
    ("key forgotten", "saver misspelt"),
]
"""Where the first is what the second is judged by."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has; no case changes it but by results of its own."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(tiny_llama, folder / "model")
    shutil.copy(calibration_file, folder / "calibration.jsonl")
    (folder / "good.yaml").write_text(STATIC, encoding="utf-8")
    dynamic = STATIC.replace("scope: per_tensor, dtype: int8, symmetric: False", "scope: per_token, dtype: int8")
    compressed = dynamic.replace("ascendv1_saver", "compressed_tensors_saver")
    (folder / "compressed.yaml").write_text(compressed, encoding="utf-8")
    for name in ("gguf", "lora", "full", "recipes"):
        (folder / name).mkdir()
    (folder / "gguf" / "model-q4_k_m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    shutil.copy(tiny_llama / "model.safetensors", folder / "lora" / "adapter_model.safetensors")
    (folder / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    (folder / "recipes" / "w8a8.yaml").write_text(BLOCK, encoding="utf-8")
    return folder


@pytest.fixture
def refused(here: Program) -> Callable[..., str]:
    """``refused(words, place, right, code=2)``: one error that names the place and offers what is right."""

    def check(words: list[str], place: str, right: str, code: int = 2) -> str:
        done = here(*words)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
        error = done.stderr.partition("error: ")[2]
        what, _, hint = error.partition("hint: ")
        assert place in what, error
        assert right in (hint or what), error  # a message that says what to write needs no hint
        return error

    return check


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is run on a terminal has one, too."""
    monkeypatch.setattr("modelslim.cli.choosing._can_ask", lambda: False)


@pytest.mark.parametrize("mistake", COMMAND_LINES.values(), ids=list(COMMAND_LINES))
def test_a_wrong_command_line_costs_one_correction(
    mistake: Mistake, folder: Path, refused: Callable[..., str], here: Program
) -> None:
    def filled(text: str) -> str:
        return text.replace("{folder}", str(folder))

    try:
        refused(shlex.split(filled(mistake.words)), filled(mistake.place), filled(mistake.right))
        if mistake.then:
            done = here(*shlex.split(filled(mistake.then)))
            assert done.returncode == 0, done.stderr
    finally:
        for name in ("out", "full_2", "model_2"):
            shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.parametrize("slip", YAML.values(), ids=list(YAML))
def test_a_wrong_protocol_costs_one_correction(
    slip: Slip, folder: Path, tmp_path: Path, refused: Callable[..., str], here: Program
) -> None:
    good = slip.good if slip.old in slip.good else slip.good.replace('["*"]', slip.old)
    wrong = good.replace(slip.old, slip.new)
    assert wrong != good
    shutil.copy(folder / "calibration.jsonl", tmp_path)
    protocol = tmp_path / "protocol.yaml"
    words = ["plan", "--model_path", str(folder / "model"), "--device", "cpu", "--config_path", str(protocol)]
    protocol.write_text(wrong, encoding="utf-8")
    error = refused(words, f"{protocol}{slip.place}", slip.right)
    assert len(re.findall(rf"{protocol}:\d+:\d+: ", error)) == 1, error
    protocol.write_text(good, encoding="utf-8")
    done = here(*words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slips", TOGETHER, ids=" and ".join)
def test_two_mistakes_of_which_one_hides_the_other_are_told_at_once(
    slips: tuple[str, str], folder: Path, tmp_path: Path, here: Program
) -> None:
    protocol = tmp_path / "protocol.yaml"
    words = ["plan", "--model_path", str(folder / "model"), "--device", "cpu", "--config_path", str(protocol)]
    text = BLOCK
    for slip in (YAML[name] for name in slips):
        changed = text.replace(slip.old, slip.new)
        assert changed != text
        text = changed
    protocol.write_text(text, encoding="utf-8")
    done = here(*words)
    assert done.returncode == 2 and done.stdout == ""
    for name in slips:
        line = YAML[name].place.split(":")[1]
        assert re.search(rf"{protocol}:{line}:\d+: ", done.stderr), done.stderr
        assert YAML[name].right in done.stderr
    assert len(re.findall(rf"{protocol}:\d+:\d+: ", done.stderr)) == 2, done.stderr


def test_twenty_mistakes_and_more_are_tried() -> None:
    assert len(COMMAND_LINES) >= 20 and len(YAML) >= 20


def test_memory_that_is_too_little_is_answered_with_enough(
    folder: Path, refused: Callable[..., str], here: Program
) -> None:
    words = shlex.split(f"{PLAN} {GOOD} --max_memory".replace("{folder}", str(folder)))
    error = refused([*words, "10MiB"], "--max_memory of 10.5 MB is too little", "give it ")
    enough = re.search(r"give it (\w+)", error)
    assert enough is not None
    done = here(*words, enough[1])
    assert done.returncode == 0, done.stderr


def test_workers_are_for_the_cpu(
    folder: Path, refused: Callable[..., str], here: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(f"plan --model_path {{folder}}/model {GOOD} --workers 2".replace("{folder}", str(folder)))
    with monkeypatch.context() as patch:
        patch.setattr("modelslim.devices._count", lambda kind: 2 if kind == "cuda" else 0)
        error = refused([*words, "--device", "cuda"], "--workers 2 does not go with --device cuda", "--device cuda:0,1")
        assert "workers share the CPU" in error
    done = here(*words, "--device", "cpu")
    assert done.returncode == 0, done.stderr


def test_an_adapter_that_is_not_installed_can_be_installed(
    folder: Path, refused: Callable[..., str], here: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(f"{PLAN} {GOOD}".replace("{folder}", str(folder)))
    with monkeypatch.context() as patch:
        patch.setenv("MODELSLIM_PLUGINS", "modelslim-algorithm-linear-quant,modelslim-saver-ascendv1")
        refused(words, "no installed adapter serves the model_type 'llama'", "add it there", code=3)
    assert here(*words).returncode == 0


@pytest.mark.parametrize("mistake", ["option misspelt", "model misspelt", "nobody to ask", "engine misspelt"])
def test_programs_get_the_same_hint(mistake: str, folder: Path, here: Program, as_json: Any) -> None:
    case = COMMAND_LINES[mistake]
    done = here(*shlex.split(case.words.replace("{folder}", str(folder))), "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert case.right.replace("{folder}", str(folder)) in error["hint"]


@pytest.mark.parametrize("name", ["x" * 5000, ""])
def test_a_name_that_no_file_can_have_is_refused_too(name: str, here: Program) -> None:
    for option in ("--model_path", "--config_path"):
        done = here("plan", option, name)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and "internal error" not in done.stderr
