# SPDX-License-Identifier: Apache-2.0
"""The quick guide's command lines and protocols as printed there, with only paths and the device changed."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

Program = Callable[..., subprocess.CompletedProcess[str]]
Terminal = Callable[..., tuple[int, str]]

EXAMPLE_1 = (
    "quant --model_path ${MODEL_PATH} --save_path ${SAVE_PATH} --device npu --model_type Qwen2.5-7B-Instruct "
    "--quant_type w8a8 --trust_remote_code True"
)
EXAMPLE_2 = (
    "quant --model_path ${MODEL_PATH} --save_path ${SAVE_PATH} --device npu --model_type ${MODEL_TYPE} "
    "--config_path ${CONFIG_PATH} --trust_remote_code ${TRUST_REMOTE_CODE}"
)
EXAMPLE_3 = (
    "quant --model_path ${MODEL_PATH} --save_path ${SAVE_PATH} --device npu:0,1,2,3 --model_type ${MODEL_TYPE} "
    "--quant_type w8a8 --trust_remote_code ${TRUST_REMOTE_CODE}"
)
SHORT = ("--calib_samples", "4", "--calib_length", "32")
GOOD = Path(__file__).parents[1] / "protocol" / "good"
# The protocol of the chapter on layer-wise quantization, its slip included.
LAYER_WISE = """\
apiversion: "modelslim_v1"
spec:
  runner: "dp_layer_wise"
  process:
    - type: "linear_quant"
      qconfig:
        act:
          scope: "per_tensor"
          dtype="int8"
          symmetric: false
          method: "minmax"
        weight:
          scope: "per_channel"
          dtype="int8"
          symmetric: true
          method: "minmax"
      include: ["*"]
"""
HAS_NPU = hasattr(torch, "npu") and torch.npu.is_available()


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A qwen2 of two layers in a folder that is called like the model of the guide."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    path = tmp_path_factory.mktemp("guide") / "Qwen2.5-7B-Instruct"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def words(tiny_qwen2: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``words(line, device="cpu", config_path=...)``: a line of the guide with its variables filled in."""

    def fill(line: str, device: str = "cpu", config_path: Path = GOOD / "guide_static.yaml") -> list[str]:
        values = {
            "${MODEL_PATH}": str(tiny_qwen2),
            "${SAVE_PATH}": str(tmp_path / "out"),
            "${MODEL_TYPE}": "Qwen2.5-7B-Instruct",
            "${CONFIG_PATH}": str(config_path),
            "${TRUST_REMOTE_CODE}": "True",
        }
        found = [values.get(word, word) for word in shlex.split(line)]
        found[found.index("--device") + 1] = device
        return found

    return fill


def schemes(folder: Path) -> set[str]:
    """The schemes of the linears inside the layers."""
    description = json.loads((folder / "quant_model_description.json").read_text(encoding="utf-8"))
    return {scheme for name, scheme in description.items() if name.endswith("_proj.weight")}


def assert_near_the_source(folder: Path, source: Path) -> None:
    """Codes times scales are the weight of the source within half a step; scales may be rounded to bfloat16."""
    saved = load_file(next(folder.glob("*.safetensors")))
    name = "model.layers.1.mlp.gate_proj"
    assert saved[f"{name}.weight"].dtype == torch.int8
    # The format stores the weight's scale multiplied by that of the input.
    scale = (saved[f"{name}.deq_scale"].double() / saved[f"{name}.input_scale"].double()).reshape(-1, 1)
    weight = load_file(source / "model.safetensors")[f"{name}.weight"].double()
    error = (saved[f"{name}.weight"].double() * scale - weight).abs()
    assert bool((error <= 0.5 * scale + weight.abs() / 256).all())


@pytest.mark.skipif(HAS_NPU, reason="this machine has the device")
@pytest.mark.parametrize(
    ("line", "device"), [(EXAMPLE_1, "npu"), (EXAMPLE_2, "npu"), (EXAMPLE_3, "npu:0,1,2,3"), (EXAMPLE_1, "npu:0")]
)
def test_without_an_npu_the_guides_device_is_one_error_with_the_remedy(
    line: str, device: str, words: Callable[..., list[str]], here: Program, tmp_path: Path
) -> None:
    taken = [*words(line, device), *(() if line is EXAMPLE_2 else ("--yes",)), *SHORT]
    done = here(*taken)
    assert done.returncode == 2
    errors = [text for text in done.stderr.splitlines() if text.startswith(("error: ", "hint: "))]
    assert errors[0] == f"error: --device {device!r} does not exist: this machine has none"
    assert len(errors) == 2 and errors[1].startswith("hint: the best here is --device ")
    assert not (tmp_path / "out").exists()
    # The hint is the one correction that is needed.
    taken[taken.index(device)] = errors[1].removeprefix("hint: the best here is --device ")
    done = here(*taken)
    assert done.returncode == 0, done.stderr


def test_example_1_on_a_terminal_and_then_verify(
    words: Callable[..., list[str]], terminal: Terminal, here: Program, tmp_path: Path, tiny_qwen2: Path
) -> None:
    """A newcomer's two commands; the whole calibration set, and the one question is answered."""
    code, said = terminal("y\n", *words(EXAMPLE_1))
    assert code == 0, said
    assert said.count("Take this practice?") == 1
    assert "w8a8 was asked for and it is made for any model" in said
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["practice"]["model_type"] == "Qwen2.5-7B-Instruct"
    assert (out / "Qwen2.5-7B-Instruct_best_practice.yaml").is_file()
    assert schemes(out) == {"W8A8_DYNAMIC"}
    done = here("verify", out, "--float", tiny_qwen2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faults" in done.stdout


def test_example_1_with_the_guides_tags(words: Callable[..., list[str]], here: Program, tmp_path: Path) -> None:
    tagged = [*words(EXAMPLE_1), "--tag", "vLLM-Ascend", "Atlas_A2_Inference", *SHORT]
    done = here(*tagged)
    assert done.returncode == 2 and "--yes takes it" in done.stderr
    done = here(*tagged, "--yes")
    assert done.returncode == 0, done.stderr
    assert "warning: the tag" not in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["practice"]["tags"] == ["vLLM-Ascend", "Atlas_A2_Inference"]
    assert here("verify", tmp_path / "out", "--engine", "vllm-ascend").returncode == 0


def test_example_2_with_the_guides_dense_protocol(
    words: Callable[..., list[str]], here: Program, tmp_path: Path, tiny_qwen2: Path
) -> None:
    done = here(*words(EXAMPLE_2), *SHORT)
    assert done.returncode == 0, done.stderr
    assert schemes(tmp_path / "out") == {"W8A8", "FLOAT"}  # the guide leaves down_proj out
    assert_near_the_source(tmp_path / "out", tiny_qwen2)
    assert here("verify", tmp_path / "out", "--float", tiny_qwen2).returncode == 0


def test_example_3_with_processes_for_devices(
    words: Callable[..., list[str]], program: Program, here: Program, tmp_path: Path
) -> None:
    """What npu:0,1,2,3 is to NPUs, --workers is to the CPU; two are run, since each takes seconds to start."""
    line = words(EXAMPLE_3)
    four = [word for word in line[1:] if word not in ("--save_path", str(tmp_path / "out"))]
    planned = here("plan", *four, "--workers", "4")
    assert planned.returncode == 0 and "dp_layer_wise" in planned.stdout, planned.stderr
    done = program(*line, "--workers", "2", "--yes", *SHORT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["samples"] == 4
    assert "runner dp_layer_wise" in done.stderr
    assert here("verify", tmp_path / "out").returncode == 0


def test_the_layer_wise_protocol_is_put_right_by_what_its_errors_say(
    words: Callable[..., list[str]], here: Program, tmp_path: Path, tiny_qwen2: Path
) -> None:
    config = tmp_path / "layer_wise.yaml"
    config.write_text(LAYER_WISE, encoding="utf-8")
    line = [*words(EXAMPLE_2, config_path=config), *SHORT]
    done = here(*line)
    assert done.returncode == 2
    first, *places = done.stderr.splitlines()
    assert first.startswith("error: ") and len(places) == 2
    for place, number in zip(places, (9, 14), strict=True):
        assert place.startswith(f"{config}:{number}:11: ")
        assert place.endswith('written dtype="int8", YAML wants dtype: "int8"')
    config.write_text(LAYER_WISE.replace('dtype="int8"', 'dtype: "int8"'), encoding="utf-8")
    done = here(*line)
    assert done.returncode == 2
    # The guide's protocol is an excerpt: without a saver there would be no result.
    assert "missing key 'save'" in done.stderr and "installed savers: ascendv1_saver" in done.stderr
    whole = yaml.safe_load(config.read_text(encoding="utf-8"))
    whole["spec"]["save"] = [{"type": "ascendv1_saver", "part_file_size": 4}]
    config.write_text(yaml.safe_dump(whole), encoding="utf-8")
    done = here(*line)
    assert done.returncode == 0, done.stderr
    assert schemes(tmp_path / "out") == {"W8A8"}
    assert_near_the_source(tmp_path / "out", tiny_qwen2)
