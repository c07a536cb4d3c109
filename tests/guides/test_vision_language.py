# SPDX-License-Identifier: Apache-2.0
"""docs/guides/vision_language.md is true: its listings are files that run, its outputs and messages are real."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelslim_qwen3_vl_moe_by_hand.adapter as by_hand
import pytest
import torch
from safetensors.torch import load_file

from modelslim.api import hookimpl
from modelslim.cli.main import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "vision_language.md").read_text(encoding="utf-8")
MODEL = "tests/models/qwen3-vl-moe-tiny"
PROTOCOL = "tests/protocol/good/guide_vlm.yaml"
ADAPTERS = ("qwen3_vl_moe", "qwen3_vl_moe_by_hand", "qwen3_vl_moe_short", "qwen3_vl_moe_blocks", "transformers")
LAYERS, EXPERTS = 4, 8


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file that the line above it names."""

    language: str
    text: str
    file: str


BLOCKS = [
    Block(match["language"], match["text"], match["file"] or "")
    for match in re.finditer(
        r"(?:<!-- from (?P<file>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
    )
]
LISTINGS = [block for block in BLOCKS if block.language in ("python", "toml", "yaml")]
COMMANDS = [block.text for block in BLOCKS if block.text.startswith("$ ")]


@pytest.fixture(autouse=True)
def in_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def quantize(adapter: str, path: Path) -> Path:
    words = ["--model_path", MODEL, "--config_path", PROTOCOL, "--device", "cpu", "--model_type", adapter]
    assert main(["quant", *words, "--save_path", str(path), "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Directory of the result by adapter; quantized once."""
    folder = tmp_path_factory.mktemp("results")

    def find(adapter: str) -> Path:
        return folder / adapter if (folder / adapter).exists() else quantize(adapter, folder / adapter)

    yield find
    shutil.rmtree(folder)


@pytest.mark.parametrize("block", LISTINGS, ids=lambda block: f"{Path(block.file).name}-{len(block.text)}")
def test_listings_are_word_for_word_parts_of_files(block: Block) -> None:
    assert block.file, block.text
    assert f"\n{block.text}" in "\n" + (ROOT / block.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["adapter.py", "experts.py", "pyproject.toml"])
def test_listings_of_the_adapter_by_hand_are_the_whole_files(name: str) -> None:
    folder = ROOT / "examples" / "qwen3_vl_moe_by_hand"
    (file,) = (path for path in folder.rglob(name) if "build" not in path.relative_to(folder).parts)  # pip's copy
    shown = [line for block in LISTINGS if (ROOT / block.file) == file for line in block.text.splitlines() if line]
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    header = 0 if name.endswith(".toml") else 2  # licence and docstring
    assert shown == lines[header:]


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in GUIDE.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", GUIDE)
    assert len(links) > 10
    for path, anchor in links:
        assert path or anchor in headings, anchor
        assert not path or (ROOT / "docs" / "guides" / path).exists(), path


PHASES = "embeddings|units|KL per layer|copying|verification|report"


def words_of(line: str) -> str:
    """A line of output without what differs between two runs: widths of columns, times and memory.

    Of a phase only its name remains: what most of its memory is for depends on the processor.
    """
    phase = re.match(PHASES, line)
    return phase[0] if phase else re.sub(r"\d+([.,]\d+)*", "0", " ".join(line.split()))


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: text.split()[2] + str(len(text)))
def test_commands_write_what_the_guide_shows(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, *shown = text.splitlines()
    save_path = str(tmp_path / "result")
    words = [save_path if word == "qwen3-vl-moe-w8a8" else word for word in shlex.split(command)[2:]]
    assert main(words) == 0
    done = capfd.readouterr()
    written = [line.replace(save_path, "qwen3-vl-moe-w8a8") for line in (done.err + done.out).splitlines()]
    if words[0] == "plan":  # of which only the estimated times differ between two runs
        table = [line for line in shown if line.startswith(("model.", "lm_head", "all else", "size", "bits"))]
        assert [line for line in table if line not in written] == []
    # What the run held beyond the program is not known, nor shown, where a test before it has held more.
    shown = [line for line in shown if not line.startswith("run alone")]
    remaining = iter([words_of(line) for line in written])
    assert [line for line in shown if line != "..." and words_of(line) not in remaining] == []


def test_table_of_the_plan_is_shown_whole() -> None:
    (text,) = (text for text in COMMANDS if "$ modelslim plan" in text and "by_hand" in text)
    assert "..." not in text
    assert text.count("W8A8_DYNAMIC") == 3


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_schemes_are_those_that_the_guide_states(adapter: str, results: Callable[[str], Path]) -> None:
    description = json.loads((results(adapter) / "quant_model_description.json").read_text(encoding="utf-8"))
    for layer in range(LAYERS):
        decoder, block = f"model.language_model.layers.{layer}", f"model.visual.blocks.{layer}"
        expected = {f"{decoder}.self_attn.{part}_proj.weight": "W8A8" for part in "qkvo"}
        expected |= {f"{block}.{part}.weight": "W8A8" for part in ("attn.qkv", "attn.proj", "mlp.linear_fc1")}
        expected |= {f"{block}.mlp.linear_fc2.weight": "FLOAT", f"{decoder}.mlp.gate.weight": "FLOAT"}
        for expert in range(EXPERTS):
            for part in ("gate", "up", "down"):
                expected[f"{decoder}.mlp.experts.{expert}.{part}_proj.weight"] = "W8A8_DYNAMIC"
        assert {name: description.get(name) for name in expected} == expected
    mergers = {name: scheme for name, scheme in description.items() if "merger" in name}
    assert len(mergers) == 18  # three mergers: a norm and two linears, each with a bias
    assert set(mergers.values()) == {"FLOAT"}


@pytest.mark.parametrize("adapter", ADAPTERS[1:])
def test_all_adapters_of_the_guide_give_what_the_plugin_of_the_family_gives(
    adapter: str, results: Callable[[str], Path]
) -> None:
    ours, plugins = (results(name) for name in (adapter, "qwen3_vl_moe"))
    if adapter != "qwen3_vl_moe_blocks":  # whose units come in smaller pieces, so that the order in the file differs
        assert digests(ours) == digests(plugins)
    mine, other = (read_all(path) for path in (ours, plugins))
    assert mine.keys() == other.keys()
    assert [name for name in other if not torch.equal(mine[name], other[name])] == []


def digests(result: Path) -> dict[str, str]:
    files = [*result.glob("*.safetensors"), result / "quant_model_description.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_all(result: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in result.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_report_has_what_the_guide_shows_of_it(results: Callable[[str], Path]) -> None:
    (block,) = (block for block in BLOCKS if block.language == "json")
    shown = json.loads(block.text)
    report = json.loads((results("qwen3_vl_moe_by_hand") / "report.json").read_text(encoding="utf-8"))
    (unit,) = (unit for unit in report["units"] if unit["unit"] == shown["unit"])
    assert shown.keys() <= unit.keys()
    assert {"seconds", "linears"} <= unit.keys()
    for record in (shown, unit):
        (experts,) = record["experts"].values()
        assert len(experts["tokens"]) == EXPERTS
        assert sum(experts["tokens"]) == 2 * record["tokens"]
    assert (shown["tokens"], shown["borrowed"]) == (unit["tokens"], [])


SOURCE = Path(by_hand.__file__).read_text(encoding="utf-8")
VISIT = SOURCE[
    SOURCE.index('        yield ProcessRequest("model.visual"') : SOURCE.index(
        "\n    @hookimpl\n    def generate_model_forward"
    )
]
TOWER, REST = VISIT.split("\n", 1)
MISTAKES: Mapping[str, tuple[str, str, str]] = {
    "default": (
        "def init_model(self, device: str)",
        'def init_model(self, device: str = "npu")',
        "argument 'device' of init_model has a default, and pluggy never fills an argument that has one",
    ),
    "no_marker": (
        "    @hookimpl\n    def handle_dataset",
        "    def handle_dataset",
        "handle_dataset is not marked as a hook and would never be called",
    ),
    "argument": (
        "def generate_model_visit(self, model: Any)",
        "def generate_model_visit(self, modle: Any)",
        "argument 'modle' of generate_model_visit is unknown",
    ),
    "weights": (
        'with torch.device("meta"):',
        'with torch.device("cpu"):',
        'init_model("meta") of adapter Qwen3VLMoeByHand gives a model that holds model.visual.patch_embed.proj.weight',
    ),
    "buffers": (
        'if device != "meta":',
        "if False:",
        "leaves the buffer model.visual.rotary_pos_emb.inv_freq on meta",
    ),
    "turned": (
        "**expert_sources(model, shapes)}",
        "**{name: WeightSource(one.keys) for name, one in expert_sources(model, shapes).items()}}",
        "has the shape [8, 128, 192], config.json asks for [8, 192, 128] "
        "(turned: get_weight_sources of the adapter must convert it)",
    ),
    "no_source": ("return {**same, **", "return {**", "holds no tensor for"),
    "visited_name": (
        'yield ProcessRequest(f"model.language_model.layers.{index}", layer)',
        'yield ProcessRequest(f"language_model.layers.{index}", layer)',
        "the adapter visits language_model.layers.0, and the model has no module of that name",
    ),
    "order": (
        VISIT,
        f"{REST.rstrip()}\n{TOWER}\n",
        "the forward arrives at model.language_model.layers.0 behind model.visual, and the visit says the reverse",
    ),
    "arriving_name": (
        'name = f"model.language_model',
        'name = f"language_model',
        "the forward arrives at language_model.layers.0, which the visit does not name",
    ),
    "last_unit": (
        "in enumerate(language.layers):",
        "in enumerate(language.layers[:-1]):",
        "the forward ends before model.language_model.layers.1, the last unit of the visit",
    ),
    "deepstack": (
        "if index < len(deepstack):",
        "if False:",
        "the first unit that differs is model.language_model.layers.1: differs by up to",
    ),
    "positions": (
        "language.rotary_emb(hidden, rotary_positions)",
        "language.rotary_emb(hidden, torch.arange(hidden.shape[1])[None].expand(3, 1, -1))",
        "of its arguments, position_embeddings differ",
    ),
    "unpacking": (
        "seen = yield",
        "seen, deepstack = yield",
        "it fails behind model.visual: ValueError: too many values to unpack (expected 2)",
    ),
    "tuple": (
        "dict(arguments))\n",
        "dict(arguments))\n            hidden = hidden[0]\n",
        "it fails behind model.language_model.layers.0: IndexError",
    ),
    "called": (
        'seen = yield ProcessRequest("model.visual", model.model.visual, (inputs["pixel_values"], grid))',
        'seen = model.model.visual(inputs["pixel_values"], grid)',
        "it fails in model.visual: RuntimeError: Tensor on device cpu is not on the expected device meta!",
    ),
}
"""By name: what is replaced in the adapter by hand, by what, and what the user then reads."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_adapter_is_told_as_the_guide_says(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right, wrong, message = MISTAKES[mistake]
    assert SOURCE.count(right) == 1
    module = types.ModuleType("mistaken")
    exec(compile(SOURCE.replace(right, wrong), "mistaken.py", "exec"), module.__dict__)
    monkeypatch.setattr(by_hand, "Qwen3VLMoeByHand", module.Qwen3VLMoeByHand)
    words = ["--model_path", MODEL, "--config_path", PROTOCOL, "--model_type", "qwen3_vl_moe_by_hand"]
    assert main(["quant", *words, "--device", "cpu", "--save_path", str(tmp_path / "result")]) in (2, 3)
    assert message in capfd.readouterr().err
    assert message in GUIDE
    assert list(tmp_path.iterdir()) == []


ENTRY = "modelslim_qwen3_vl_moe_by_hand.adapter:Qwen3VLMoeByHand"


@pytest.mark.parametrize(
    ("group", "entry", "message"),
    [
        (
            "modelslim.adapter",
            f"mine = {ENTRY}",
            "there is no entry-point group modelslim.adapter; did you mean 'adapters'?",
        ),
        (
            "modelslim.adapters",
            f"mine = {ENTRY.replace('Hand', 'Hnad')}",
            "has no attribute 'Qwen3VLMoeByHnad'",
        ),
        (
            "modelslim.adapters",
            f"qwen3_vl_moe = {ENTRY}",
            "claimed by modelslim-adapter-mine 1.0 and modelslim-adapter-qwen3-vl 0.1.0",
        ),
    ],
)
def test_a_mistake_in_the_entry_points_is_a_row_of_the_plugins(
    group: str,
    entry: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modelslim-adapter-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plugins"]) == 0
    assert message in capfd.readouterr().out
    assert message in GUIDE


def test_a_name_that_nobody_registered_is_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model_path",
        MODEL,
        "--config_path",
        PROTOCOL,
        "--model_type",
        "qwen3_vl_moe_by_hnad",
        "--device",
        "cpu",
    ]
    assert main(["plan", *words]) == 0
    message = "no adapter is registered for --model_type qwen3_vl_moe_by_hnad"
    warning = capfd.readouterr().err
    assert message in warning
    assert "did you mean 'qwen3_vl_moe_by_hand'?" in warning
    assert message in GUIDE


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("index.jsonl", {"image": "strete.jpg"}, "image 'strete.jpg' does not exist"),
        ("index.jsonl", {"image": "a.gif"}, "image 'a.gif' is not .jpg, .jpeg or .png"),
        ("index.jsonl", {"image": "shapes.png", "text": ""}, "text is empty"),
        ("calib.jsonl", {"image": "shapes.png"}, "has no text, and default_text does not apply to calib.jsonl"),
        ("index.jsonl", {"video": "ferry.mp4"}, "calibration sample 1 is no text with or without an image"),
    ],
)
def test_a_mistake_in_the_data_is_told_as_the_guide_says(
    name: str, record: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calib"
    folder.mkdir()
    shutil.copy(ROOT / "core" / "modelslim" / "calibration" / "calibImages" / "shapes.png", folder)
    (folder / name).write_text(json.dumps(record) + "\n", encoding="utf-8")
    if "video" in record:
        (folder / record["video"]).write_bytes(b"no video, and nobody looks")
    protocol = tmp_path / "protocol.yaml"
    text = (ROOT / PROTOCOL).read_text(encoding="utf-8")
    protocol.write_text(text.replace("dataset: calibImages", f"dataset: {folder}"), encoding="utf-8")
    words = ["--model_path", MODEL, "--config_path", str(protocol), "--model_type", "qwen3_vl_moe_by_hand"]
    assert main(["quant", *words, "--device", "cpu", "--save_path", str(tmp_path / "result")]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "InvalidDatasetError" in error
    assert message in GUIDE


def test_driving_the_models_own_forward_does_the_same(
    results: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guide says the forward by hand could be replaced with."""
    from modelslim.api import drive

    class Driven(by_hand.Qwen3VLMoeByHand):
        @hookimpl
        def generate_model_forward(self, model: Any, inputs: Any) -> Any:
            return (yield from drive(self.generate_model_visit(model), model, **inputs))

    assert "yield from drive(self.generate_model_visit(model), model, **inputs)" in GUIDE
    monkeypatch.setattr(by_hand, "Qwen3VLMoeByHand", Driven)
    driven = quantize("qwen3_vl_moe_by_hand", tmp_path / "driven")
    assert digests(driven) == digests(results("qwen3_vl_moe_by_hand"))
