# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error with place and remedy, the right exit code, nothing left, the source untouched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Program = Callable[..., subprocess.CompletedProcess[str]]
Snapshot = Callable[[Path], dict[str, str]]
Damage = Callable[[Path], object]

GOOD = """\
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
DATA_FREE = GOOD.replace("scope: per_tensor, dtype: int8, symmetric: False", "scope: per_token, dtype: int8")


class Attempt:
    """A run of ``quant`` in a folder of its own that holds a copy of a model, a protocol and calibration data."""

    def __init__(self, folder: Path, model: Path, run: Program, snapshot: Snapshot) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.save = folder / "out"
        self.config = folder / "protocol.yaml"
        self.calibration = folder / "calibration.jsonl"
        self._run = run
        self._snapshot = snapshot
        shutil.copytree(model, self.model)
        self.config.write_text(GOOD)
        self.calibration.write_text('{"text": "The river rose in the night."}\n')

    def words(self, command: str = "quant") -> list[str]:
        """The command line of ``quant`` or ``plan``."""
        options = {"--model_path": self.model, "--config_path": self.config, "--device": "cpu"}
        if command == "quant":
            options["--save_path"] = self.save
        only = ["--quiet"] if command == "quant" else []
        return [command, *only, *(str(word) for pair in options.items() for word in pair)]

    def refused(self, code: int, *parts: str, extra: tuple[str, ...] = ()) -> str:
        """Run it; it must fail with one error that contains the parts in this order, and leave all as it was.

        Returns:
            The error.
        """
        before = self._snapshot(self.folder)
        done = self._run(*self.words(), *extra)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        error = done.stderr
        assert error.startswith("error: "), error
        assert error.count("error: ") == 1, error
        assert "Traceback" not in error
        assert "internal error" not in error
        position = 0
        for part in parts:
            assert part in error[position:], error
            position = error.index(part, position)
        assert self._snapshot(self.folder) == before
        assert not list(self.folder.rglob("*.partial"))
        return error


@pytest.fixture
def attempt(tmp_path: Path, tiny_llama: Path, here: Program, snapshot: Snapshot) -> Attempt:
    return Attempt(tmp_path / "attempt", tiny_llama, here, snapshot)


def edit_config(**changes: Any) -> Damage:
    """Set keys of config.json; None removes one."""

    def damage(model: Path) -> None:
        config = {**json.loads((model / "config.json").read_text()), **changes}
        config = {key: value for key, value in config.items() if value is not None}
        (model / "config.json").write_text(json.dumps(config))

    return damage


def cut(file: str, size: int) -> Damage:
    return lambda model: os.truncate(model / file, size)


def test_the_attempt_succeeds_when_nothing_is_wrong(attempt: Attempt, here: Program) -> None:
    assert here(*attempt.words()).returncode == 0
    assert (attempt.save / "quant_model_description.json").exists()


# The model


def test_a_model_directory_that_does_not_exist_is_named(attempt: Attempt) -> None:
    attempt.model = attempt.folder / "nowhere"
    attempt.refused(2, "'--model_path'", str(attempt.model), "does not exist", "quant --help")


def test_a_model_path_that_is_a_file_is_named(attempt: Attempt) -> None:
    attempt.model = attempt.model / "config.json"
    attempt.refused(2, "'--model_path'", str(attempt.model), "is a file")


def test_an_empty_model_directory_is_refused_with_what_it_must_hold(attempt: Attempt) -> None:
    for file in attempt.model.iterdir():
        file.unlink()
    attempt.refused(2, f"{attempt.model} is empty", "hint: --model_path must hold config.json, the weights")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (
            cut("model.safetensors", 0),
            ["model.safetensors: not a whole safetensors file: 0 bytes", "download it again"],
        ),
        (cut("model.safetensors", 1000), ["not a whole safetensors file: 1000 bytes", "truncated"]),
        (cut("model.safetensors", 300_000), ["model.safetensors: truncated: 300000 bytes", "interrupted", "again"]),
        (
            lambda model: (model / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}})
            ),
            ["index.json: names 1 of 2 files that are not there: model-00001-of-00002", "fetch the missing files"],
        ),
        (lambda model: (model / "config.json").unlink(), ["config.json: no such file", "--model_path must hold"]),
        (lambda model: (model / "config.json").write_text("{"), ["config.json: cannot be read as JSON", "line 1"]),
        (edit_config(architectures=None), ["config.json has no architectures", "take config.json from"]),
        (edit_config(architectures=[]), ["config.json has no architectures", "take config.json from"]),
        (edit_config(model_type=None), ["config.json has no model_type", "take config.json from"]),
        (edit_config(model_type="llamma"), ["config.json", "model type `llamma`", "check model_type"]),
        (edit_config(hidden_size=32), ["do not fit config.json", "model.embed_tokens.weight has the shape [512, 64]"]),
        (edit_config(num_hidden_layers=4), ["holds no tensor for model.layers.3.", "download is incomplete"]),
        (edit_config(quantization_config={"quant_method": "fp8"}), ["is quantized already", "float checkpoint"]),
        (
            lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
            ["pytorch_model.bin and no safetensors", "save_pretrained"],
        ),
        (
            edit_config(auto_map={"AutoConfig": "own.Config"}, model_type="own"),
            ["own code", "--trust_remote_code True"],
        ),
    ],
)
def test_a_damaged_model_is_refused_with_the_place_and_what_to_do(
    damage: Damage, parts: list[str], attempt: Attempt
) -> None:
    damage(attempt.model)
    attempt.refused(2, *parts)


@pytest.mark.parametrize("text", [GOOD, DATA_FREE], ids=["static", "dynamic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.down_proj.weight",  # quantized
        "model.layers.1.input_layernorm.weight",  # copied, of a unit
        "model.embed_tokens.weight",  # copied, outside the units
        "lm_head.weight",  # copied, and no forward of the calibration needs it
    ],
)
def test_a_value_that_is_not_finite_is_named_wherever_it_is(
    name: str, value: float, text: str, attempt: Attempt
) -> None:
    tensors = load_file(attempt.model / "model.safetensors")
    tensors[name].view(-1)[[5, 17]] = value
    save_file(tensors, attempt.model / "model.safetensors", metadata={"format": "pt"})
    attempt.config.write_text(text)
    attempt.refused(2, f"model.safetensors: {name} holds 2 values that are NaN or infinite", "hint: ", "again")


def test_a_model_that_overflows_during_calibration_is_told_by_its_linear(attempt: Attempt) -> None:
    tensors = load_file(attempt.model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.full_like(tensors["model.layers.0.mlp.up_proj.weight"], 3e38)
    save_file(tensors, attempt.model / "model.safetensors", metadata={"format": "pt"})
    attempt.refused(1, "model.layers.0.mlp.down_proj: its input holds NaN or infinity during calibration", "hint: ")


# The place of the result


def test_a_save_path_that_is_not_empty_is_refused(attempt: Attempt) -> None:
    attempt.save.mkdir()
    (attempt.save / "precious.txt").write_text("mine")
    attempt.refused(2, f"--save_path {attempt.save} is not empty", "choose another directory")


@pytest.mark.parametrize("inside", ["", "out", "deeper/still/out", "../model/out"])
def test_a_save_path_inside_the_model_is_refused(inside: str, attempt: Attempt) -> None:
    attempt.save = attempt.model / inside
    attempt.refused(2, f"--save_path {attempt.save} lies inside --model_path", "choose another place")


def test_a_save_path_around_the_model_is_refused(attempt: Attempt) -> None:
    attempt.save = attempt.folder
    attempt.refused(2, "is not empty")


def test_a_save_path_that_is_or_lies_below_a_file_is_refused(attempt: Attempt) -> None:
    attempt.save.write_text("mine")
    attempt.refused(2, "'--save_path'", str(attempt.save), "is a file")
    attempt.save = attempt.save / "below"
    attempt.refused(2, f"--save_path {attempt.save}", "is a file", "choose another place")


def test_the_current_directory_cannot_be_the_save_path(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    (attempt.folder / "empty").mkdir()
    monkeypatch.chdir(attempt.folder / "empty")
    attempt.save = Path()
    attempt.refused(2, "--save_path . is the current directory", "choose a directory inside it, such as quantized")


def test_a_mount_point_cannot_be_the_save_path(attempt: Attempt, tmpfs: Callable[[int], Path]) -> None:
    attempt.save = tmpfs(10 << 20)
    attempt.refused(2, "is a mount point", f"such as {attempt.save}/quantized")


def test_a_link_to_an_empty_directory_may_be_the_save_path(attempt: Attempt, here: Program) -> None:
    (attempt.folder / "elsewhere").mkdir()
    attempt.save.symlink_to(attempt.folder / "elsewhere")
    assert here(*attempt.words()).returncode == 0
    assert attempt.save.is_symlink()
    assert (attempt.folder / "elsewhere" / "report.json").exists()


def test_a_partial_directory_that_no_run_left_is_not_removed(attempt: Attempt, here: Program) -> None:
    partial = attempt.folder / "out.partial"
    partial.mkdir()
    (partial / "precious.txt").write_text("mine")
    done = here(*attempt.words())
    assert done.returncode == 2
    assert f"{partial} is in the way" in done.stderr
    assert "move it away" in done.stderr
    assert (partial / "precious.txt").read_text() == "mine"


def test_a_result_that_cannot_fit_is_refused_before_a_weight_is_read(
    attempt: Attempt, tmpfs: Callable[[int], Path]
) -> None:
    attempt.save = tmpfs(64 << 10) / "out"
    (attempt.model / "model.safetensors").touch()
    error = attempt.refused(
        1, f"--save_path {attempt.save}: the result needs", "and 65,536 are free", "free some space"
    )
    assert int(re.search(r"needs ([\d,]+) bytes", error)[1].replace(",", "")) > 200_000  # type: ignore[index]


def test_a_disk_that_becomes_full_at_any_file_leaves_nothing_finished(
    attempt: Attempt, tmpfs: Callable[[int], Path], here: Program
) -> None:
    attempt.save = tmpfs(4 << 20) / "out"
    assert here(*attempt.words()).returncode == 0
    needed = json.loads((attempt.save / "report.json").read_text())["bytes_after"]
    disk = tmpfs(needed)
    attempt.save = disk / "out"
    messages = set()
    for slack in range(0, 1 << 20, 8 << 10):
        subprocess.run(["mount", "-o", f"remount,size={needed + slack}", str(disk)], check=True)
        if here(*attempt.words()).returncode == 0:
            break
        error = attempt.refused(1, str(disk / "out.partial"), "the disk is full", "free some space and run again")
        assert [path.name for path in disk.iterdir()] in ([], ["out.partial"])  # which the next run could continue
        shutil.rmtree(disk / "out.partial", ignore_errors=True)
        messages.add(re.sub(r".*out\.partial/?([^:]*):.*", r"\1", error.splitlines()[0]))
    # While weights are written, and each of the files after them.
    assert messages >= {"", "quant_model_weights.safetensors.index.json", "tokenizer.json"}


def test_a_file_that_grows_beyond_what_the_system_allows_is_an_error_of_saving(attempt: Attempt) -> None:
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    run = "from modelslim.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", limited + run, *attempt.words()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    # The plan's tiny model does not fit either, which is no reason to stop.
    warning = r"(warning: the forward of the adapter 'transformers' is not proven: .*File too large.*\n)?"
    assert re.fullmatch(rf"{warning}error: {attempt.save}\.partial: .*File too large\nhint: check .*\n", done.stderr)
    left = sorted(path.name for path in attempt.folder.iterdir())
    assert left == ["calibration.jsonl", "model", "out.partial", "protocol.yaml"]


# The protocol


def yaml_bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    return "\n".join(["apiversion: modelslim_v1", *lines, "spec: {process: *j, save: []}", ""])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(GOOD + "#" + "x" * 10_000_000, ["protocol.yaml: the file is larger than 1 MiB"], id="10 MB"),
        pytest.param(yaml_bomb(), ["protocol.yaml:2:", "aliases expand the document to more than"], id="bomb"),
        pytest.param(
            GOOD.replace("      part_file_size: 4", "      part_file_size: 4\n      part_file_size: 5"),
            ["protocol.yaml:12:7: spec.save[0].part_file_size", "already on line 11", "keep one"],
            id="duplicate key",
        ),
        pytest.param(
            GOOD.replace("      qconfig", "\tqconfig"), ["protocol.yaml:5:1: ", "tab", "indent with spaces"], id="tab"
        ),
        pytest.param(
            re.sub(r"process:\n(    .*\n)+", "process: []\n", GOOD, count=1),
            ["protocol.yaml:3:12: spec.process: the list is empty", "linear_quant"],
            id="empty process",
        ),
        pytest.param(
            GOOD.replace("part_file_size", "part_size").replace("include", "inclde"),
            ["2 mistakes", ":8:7: spec.process[0].inclde", "mean 'include'", ":11:7: ", "mean 'part_file_size'"],
            id="unknown keys",
        ),
        pytest.param(
            GOOD.replace('["*"]', '["*q_prj*", "*_proj"]'),
            [":8:17: spec.process[0].include[0]: the pattern '*q_prj*' matches no linear", "did you mean 'q_proj'?"],
            id="pattern",
        ),
        pytest.param(
            GOOD.replace(
                "act: {scope: per_tensor, dtype: int8, symmetric: False, method: minmax}", "act: {dtype: float}"
            ).replace("scope: per_channel", "scope: per_group, group_size: 40"),
            [
                ":7:17: spec.process[0].qconfig.weight: group_size 40 does not divide the 64 inputs of model.layers.0",
                "32",
            ],
            id="group size",
        ),
        pytest.param(
            GOOD.replace("dtype: int8", 'dtype="int8"'),
            [":6:34: ", 'written dtype="int8", YAML wants dtype: "int8"', ":7:38: ", 'YAML wants dtype: "int8"'],
            id="equals in flow",
        ),
        pytest.param(
            "apiversion: modelslim_v1\nspec:\n  process:\n    - type: linear_quant\n      qconfig:\n        weight:\n"
            '          scope: "per_channel"\n          dtype="int8"\n          symmetric: true\n  save: []\n',
            [":8:11: ", 'written dtype="int8", YAML wants dtype: "int8"'],
            id="equals in block",
        ),
        pytest.param(
            GOOD.replace('["*"]', '["*q_proj"]'),
            [":6:9: ", "q_proj, k_proj and v_proj", "together"],
            id="part of fused",
        ),
        pytest.param(GOOD.replace("linear_quant", "linear_quants"), [":4:13: ", "mean 'linear_quant'"], id="processor"),
        pytest.param(GOOD.replace("ascendv1_saver", "ascend_saver"), [":10:13: ", "mean 'ascendv1_saver'"], id="saver"),
        pytest.param("\x00" * 20, ["protocol.yaml:1:1"], id="binary"),
        pytest.param("", ["protocol.yaml"], id="empty"),
    ],
)
def test_a_wrong_protocol_is_refused_with_every_place_and_what_to_write(
    text: str, parts: list[str], attempt: Attempt
) -> None:
    attempt.config.write_text(text)
    attempt.refused(2, *parts)


def test_a_protocol_that_is_not_there_is_named(attempt: Attempt) -> None:
    attempt.config = attempt.folder / "nothing.yaml"
    attempt.refused(2, "'--config_path'", str(attempt.config), "does not exist")


# The calibration data


def test_broken_lines_of_the_calibration_data_are_all_named(attempt: Attempt) -> None:
    attempt.calibration.write_text('{"text": "good"}\n{"text": \n\n{"words": "x"}\n{"text": ""}\n"good too"\n[1]\n')
    attempt.refused(
        2,
        f"{attempt.calibration}: 4 broken records",
        f"{attempt.calibration}:2: not JSON",
        f"{attempt.calibration}:4: has none of the keys",
        f"{attempt.calibration}:5: its text is empty",
        f"{attempt.calibration}:7: is list",
    )


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_calibration_set_is_refused(content: bytes, attempt: Attempt) -> None:
    attempt.calibration.write_bytes(content)
    attempt.refused(2, f"{attempt.calibration}: holds no record", "at least one text")


def test_a_calibration_set_that_is_not_there_offers_those_that_are(attempt: Attempt) -> None:
    attempt.config.write_text(GOOD.replace("calibration.jsonl", "mix_calb.jsonl"))
    attempt.refused(2, "dataset 'mix_calb.jsonl'", "did you mean 'mix_calib.jsonl'?")


@pytest.mark.parametrize("content", [b'{"text": "\xff"}\n', b'{"text": "\\ud800"}\n', b"[" * 100_000])
def test_calibration_data_that_no_editor_wrote_are_refused(content: bytes, attempt: Attempt) -> None:
    attempt.calibration.write_bytes(content)
    attempt.refused(2, str(attempt.calibration))


def test_a_missing_tokenizer_is_refused_where_calibration_needs_it_and_only_there(
    attempt: Attempt, here: Program
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (attempt.model / name).unlink()
    attempt.refused(2, f"{attempt.model}: transformers cannot load the tokenizer", "hint: the directory must hold")
    attempt.config.write_text(DATA_FREE)
    assert here(*attempt.words()).returncode == 0


# Options


@pytest.mark.parametrize(
    ("device", "parts"),
    [
        ("cuda:99", ["--device 'cuda:99' does not exist", "--device "]),
        ("npu", ["--device 'npu' does not exist: this machine has none", "--device "]),
        ("gpu", ["--device 'gpu' is not a device", "write cpu, cuda"]),
        ("cpu:1", ["--device 'cpu:1' does not exist", "use --device cpu"]),
        ("cuda:0,99", ["--device 'cuda:0,99' does not exist", "--device "]),
    ],
)
def test_a_device_that_does_not_exist_is_refused(device: str, parts: list[str], attempt: Attempt) -> None:
    attempt.refused(2, *parts, extra=("--device", device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_the_first_cuda_device_is_refused_where_there_is_none(attempt: Attempt) -> None:
    attempt.refused(2, "--device 'cuda' does not exist: this machine has none", "cpu", extra=("--device", "cuda"))


def test_an_unknown_model_type_is_a_warning_and_the_run_goes_on(attempt: Attempt, here: Program) -> None:
    done = here(*attempt.words(), "--model_type", "Acme-7B-Instruct")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: no adapter is registered for --model_type Acme-7B-Instruct")
    assert "llama" in done.stderr
    assert done.stderr.count("\n") == 1
    report = json.loads((attempt.save / "report.json").read_text())
    assert [warning in done.stderr for warning in report["warnings"]] == [True]


# Several at once, and other forms


def test_mistakes_of_syntax_and_of_meaning_are_told_together(attempt: Attempt) -> None:
    wrong = "    - {type: linear_quant, qconfig: {weight: {method: mimmax}}, include: [lm_head]}\n"
    text = GOOD.replace('include: ["*"]', 'include: ["*", "*q_prj*"]').replace("part_file_size", "part_size")
    attempt.config.write_text(text.replace("  save:\n", f"{wrong}  save:\n"))
    error = attempt.refused(2, "3 mistakes", ":8:22: ", "'*q_prj*'", ":9:", "'mimmax'", ":12:7: ", "part_file_size")
    assert error.count("hint: did you mean") == 3


@pytest.mark.parametrize(
    ("damage", "extra", "first"),
    [
        (cut("model.safetensors", 1000), (), "not a whole safetensors file"),
        (edit_config(hidden_size=32), (), "do not fit config.json"),
        (lambda model: None, ("--device", "npu"), "does not exist"),
    ],
)
def test_a_wrong_model_or_device_does_not_hide_a_wrong_protocol(
    damage: Damage, extra: tuple[str, ...], first: str, attempt: Attempt
) -> None:
    damage(attempt.model)
    attempt.config.write_text(GOOD.replace("part_file_size", "part_size"))
    attempt.refused(2, first, "protocol.yaml:11:7: spec.save[0].part_size", "did you mean", extra=extra)


def test_wrong_data_do_not_hide_a_wrong_protocol(attempt: Attempt) -> None:
    attempt.calibration.write_text("{")
    attempt.config.write_text(GOOD.replace('include: ["*"]', 'include: ["*", "*q_prj*"]'))
    attempt.refused(2, "calibration.jsonl: 1 broken record", "calibration.jsonl:1: not JSON", "protocol.yaml:8:22: ")


@pytest.mark.parametrize(
    ("damage", "kind", "code"),
    [
        (lambda attempt: attempt.config.write_text(GOOD.replace("part_file_size", "part_size")), "ProtocolError", 2),
        (lambda attempt: cut("model.safetensors", 1000)(attempt.model), "ModelError", 2),
        (lambda attempt: attempt.calibration.write_text(""), "InvalidDatasetError", 2),
        (lambda attempt: attempt.save.mkdir() or (attempt.save / "x").touch(), "UsageError", 2),
    ],
)
def test_an_error_is_one_json_document_where_json_is_asked_for(
    damage: Callable[[Attempt], object], kind: str, code: int, attempt: Attempt, here: Program
) -> None:
    damage(attempt)
    done = here(*attempt.words(), "--json")
    assert (done.returncode, done.stderr) == (code, "")
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    if kind == "ProtocolError":
        place = {key: error["diagnostics"][0][key] for key in ("file", "line", "column", "path")}
        assert place == {"file": str(attempt.config), "line": 11, "column": 7, "path": "spec.save[0].part_size"}


@pytest.mark.parametrize(
    ("extra", "code"), [(("--device", "npu"), 2), (("--modelpath", "x"), 2), (("--trust_remote_code", "maybe"), 2)]
)
def test_a_process_of_its_own_ends_with_the_same_code_and_words(
    extra: tuple[str, ...], code: int, attempt: Attempt, program: Program
) -> None:
    done = program(*attempt.words(), *extra)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(attempt.folder.glob("out*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda attempt: attempt.config.write_text(GOOD.replace('["*"]', '["*q_prj*"]')),
        lambda attempt: attempt.calibration.write_text("{"),
        lambda attempt: edit_config(hidden_size=32)(attempt.model),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(
    damage: Callable[[Attempt], object], attempt: Attempt, here: Program
) -> None:
    damage(attempt)
    error = attempt.refused(2)
    planned = here(*attempt.words("plan"))
    assert (planned.returncode, planned.stdout, planned.stderr) == (2, "", error)


def test_evaluating_what_is_no_result_is_refused(attempt: Attempt, here: Program, tiny_llama: Path) -> None:
    done = here("eval", attempt.model, "--float", tiny_llama, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*model: no installed saver recognizes .*\nhint: installed: .*\n", done.stderr)


def test_evaluating_a_damaged_result_names_the_tensor(attempt: Attempt, here: Program) -> None:
    assert here(*attempt.words()).returncode == 0
    (file,) = attempt.save.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.deq_scale"]
    save_file(tensors, file)
    done = here("eval", attempt.save, "--float", attempt.model, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "model.layers.1.mlp.up_proj.deq_scale" in done.stderr
