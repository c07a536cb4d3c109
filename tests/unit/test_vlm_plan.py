# SPDX-License-Identifier: Apache-2.0
"""A multimodal protocol from its YAML to the adapter: which data is read, which runner runs, what people are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import modelslim.plan as plan_module
from modelslim.api import InvalidDatasetError, VlmCalibSample
from modelslim.cli.main import main
from modelslim.errors import ModelSlimError, ProtocolError
from modelslim.plan import Plan, make_plan
from modelslim.run import quantize

Protocol = Callable[[str], Path]

DEFAULT = "Describe this image in detail."
STATIC = "{act: {scope: per_tensor, symmetric: false}, weight: {}}"


def vlm(more: str = "", qconfig: str = STATIC) -> str:
    return f"""\
apiversion: multimodal_vlm_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig: {qconfig}
      include: ["*"]
  save:
    - type: ascendv1_saver
{more}"""


def planned(model: Path, file: Path) -> Plan:
    return make_plan(model, file, device="cpu")


def refused(model: Path, file: Path) -> ModelSlimError:
    with pytest.raises(ModelSlimError) as caught:
        planned(model, file)
    return caught.value


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory ``images`` beside the protocols, with two images."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (12, 8), (200, 30, 30)).save(folder / "a.jpg")
    Image.new("RGB", (8, 12), (30, 30, 200)).save(folder / "b.png")
    return folder


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text model stands in for one that takes images: how long its inputs are is not asked."""
    monkeypatch.setattr(plan_module, "token_lengths", lambda session, samples, *rest, **more: [16] * len(samples))


# Data


def test_the_default_dataset_is_the_set_that_ships(tiny_llama: Path, protocol: Protocol) -> None:
    plan = planned(tiny_llama, protocol(vlm()))
    shipped = Path(str(resources.files("modelslim.calibration"))) / "calibImages"
    assert plan.dataset == shipped
    lines = (shipped / "index.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(sample.image, sample.text) for sample in plan.samples] == [
        (str(shipped / record["image"]), record.get("text", DEFAULT)) for record in map(json.loads, lines)
    ]
    assert plan.warnings == []
    assert plan.runner == "layer_wise"


def test_the_default_text_of_the_protocol_is_used(tiny_llama: Path, protocol: Protocol, images: Path) -> None:
    plan = planned(tiny_llama, protocol(vlm("  dataset: images\n  default_text: Was ist das?\n")))
    assert plan.dataset == images
    assert list(plan.samples) == [
        VlmCalibSample("Was ist das?", f"{images}/a.jpg"),
        VlmCalibSample("Was ist das?", f"{images}/b.png"),
    ]


def test_an_index_is_looked_for_beside_the_protocol(tiny_llama: Path, protocol: Protocol, images: Path) -> None:
    (images / "index.json").write_text('[{"text": "one"}]')
    for name in ("images", "images/index.json", "./images/", f"{images}/index.json"):
        assert list(planned(tiny_llama, protocol(vlm(f"  dataset: {name}\n"))).samples) == [VlmCalibSample("one")]


def test_images_that_are_left_out_are_a_warning_of_the_plan(tiny_llama: Path, protocol: Protocol, images: Path) -> None:
    (images / "texts.json").write_text('[{"image": "b.png", "text": "one"}]')
    plan = planned(tiny_llama, protocol(vlm("  dataset: images\n")))
    assert list(plan.warnings) == [f"{images}: 1 file is not named in texts.json and not used, such as 'a.jpg'"]


def test_broken_data_is_told_with_its_lines_and_with_mistakes_of_the_protocol(
    tiny_llama: Path, protocol: Protocol, images: Path
) -> None:
    (images / "a.jpg").write_bytes(b"no image")
    (images / "index.jsonl").write_text('{"image": "a.jpg"}\n{"image": "../b.png"}\n')
    file = protocol(vlm("  dataset: images\n") + "  save2: []\n")
    error = refused(tiny_llama, file)
    assert type(error) is InvalidDatasetError
    assert [(problem.place, problem.message) for problem in error.diagnostics] == [
        (f"{images}/index.jsonl:1", "image 'a.jpg' holds neither JPEG nor PNG data"),
        (f"{images}/index.jsonl:2", "image '../b.png' leaves the directory"),
        (f"{file}:10:3", "unknown key 'save2'"),
    ]


def test_a_dataset_that_is_not_there_is_a_mistake_of_the_protocol(tiny_llama: Path, protocol: Protocol) -> None:
    for qconfig in (STATIC, "{act: {scope: per_token}, weight: {}}"):
        error = refused(tiny_llama, protocol(vlm("  dataset: calibImage\n", qconfig)))
        assert type(error) is ProtocolError
        [problem] = error.diagnostics
        assert (problem.path, problem.line, problem.column) == ("spec.dataset", 9, 12)
        assert problem.hint == "did you mean 'calibImages'?"


def test_images_are_not_read_where_nothing_is_calibrated(tiny_llama: Path, protocol: Protocol, images: Path) -> None:
    (images / "a.jpg").write_bytes(b"no image")
    plan = planned(tiny_llama, protocol(vlm("  dataset: images\n", "{act: {scope: per_token}, weight: {}}")))
    assert plan.dataset is None and list(plan.samples) == []


# The runner


@pytest.mark.parametrize("word", ["layer_wise", "auto", None])
def test_the_runner_that_is_there_is_taken_without_a_word(
    tiny_llama: Path, protocol: Protocol, word: str | None
) -> None:
    plan = planned(tiny_llama, protocol(vlm(f"  runner: {word}\n" if word else "")))
    assert plan.runner == "layer_wise" and plan.warnings == []


@pytest.mark.parametrize("word", ["model_wise", "dp_layer_wise", "layer_wize", "x y", "Auto"])
def test_any_other_runner_becomes_layer_wise_with_one_line(tiny_llama: Path, protocol: Protocol, word: str) -> None:
    file = protocol(vlm(f"  runner: {word}\n"))
    plan = planned(tiny_llama, file)
    assert plan.runner == "layer_wise"
    assert list(plan.warnings) == [
        f"{file}:9:11: spec.runner: '{word}' becomes layer_wise, the only runner of multimodal_vlm_modelslim_v1"
    ]


# The commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_plan_warns_in_one_line_and_counts_the_samples(
    tiny_llama: Path, protocol: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    file = protocol(vlm("  runner: dp_layer_wise\n"))
    options = ("plan", "--model_path", tiny_llama, "--config_path", file, "--device", "cpu")
    code, out, err = run(capsys, *options)
    assert code == 0
    assert [line for line in err.splitlines() if "warning" in line] == [
        f"warning: {file}:9:11: spec.runner: 'dp_layer_wise' becomes layer_wise, "
        "the only runner of multimodal_vlm_modelslim_v1"
    ]
    assert "one pass over 8 samples of calibImages" in out
    data = json.loads(run(capsys, *options, "--json")[1])
    assert (data["runner"], data["samples"], Path(data["dataset"]).name) == ("layer_wise", 8, "calibImages")


def test_people_and_programs_are_told_the_name_that_the_guide_uses(
    tiny_llama: Path, protocol: Protocol, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "index.jsonl").write_text('{"image": "a.png"}\n')
    file = protocol(vlm("  dataset: images\n"))
    options = ("--model_path", tiny_llama, "--config_path", file, "--device", "cpu")
    code, _, err = run(capsys, "quant", *options, "--save_path", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert err.splitlines() == [
        f"error: InvalidDatasetError: {images}/index.jsonl: 1 broken record",
        f"{images}/index.jsonl:1: image 'a.png' does not exist",
        "    hint: did you mean 'b.png'?",
        "hint: correct or remove them",
    ]
    error = json.loads(run(capsys, "plan", *options, "--json")[1])["error"]
    assert error["kind"] == "InvalidDatasetError"
    assert error["message"] == f"{images}/index.jsonl: 1 broken record"


def test_schema_prints_the_multimodal_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema", "--apiversion", "multimodal_vlm_modelslim_v1")
    spec = json.loads(out)["properties"]["spec"]["properties"]
    assert code == 0
    assert {key: spec[key]["default"] for key in ("runner", "dataset", "default_text")} == {
        "runner": "layer_wise",
        "dataset": "calibImages",
        "default_text": DEFAULT,
    }
    assert "linear_quant" in out and "ascendv1_saver" in out


# To the adapter


ADAPTER = '''
import torch
from PIL import Image

from modelslim.api import hookimpl
from modelslim_transformers.adapter import TransformersAdapter

received = []


class Adapter(TransformersAdapter):
    """Sees 16 grey pixels and the bytes of the text as tokens."""

    @hookimpl
    def handle_dataset(self, dataset, device):
        received.extend(dataset)
        return [{"input_ids": torch.tensor([[*self.pixels(s.image), *s.text.encode()]])} for s in dataset]

    def pixels(self, path):
        with Image.open(path) as image:
            return image.convert("L").resize((4, 4)).tobytes()
'''


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An adapter for llama that takes images; its module."""
    site = tmp_path / "site"
    info = site / "acme_pictures-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-pictures\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[modelslim.adapters]\nllama = acme_pictures:Adapter\n")
    (site / "acme_pictures.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(site)
    yield import_module("acme_pictures")
    del sys.modules["acme_pictures"]


def test_a_run_hands_the_samples_to_the_adapter(
    tiny_llama: Path, protocol: Protocol, images: Path, tmp_path: Path, pictures: Any
) -> None:
    (images / "index.jsonl").write_text('{"image": "a.jpg", "text": "one"}\n{"image": "b.png"}\n')
    report = quantize(tiny_llama, tmp_path / "out", protocol(vlm("  dataset: images\n")), device="cpu")
    assert pictures.received == [
        VlmCalibSample("one", f"{images}/a.jpg"),
        VlmCalibSample(DEFAULT, f"{images}/b.png"),
        VlmCalibSample("one"),  # texts alone, for KL per layer
        VlmCalibSample(DEFAULT),
    ]
    assert (report["adapter"], report["samples"], report["dataset"]) == ("llama", 2, str(images))
    assert report["schemes"] == {"W8A8": 21}
    assert {unit["tokens"] for unit in report["units"]} == {16 + len("one") + 16 + len(DEFAULT)}


def test_a_model_without_eyes_says_so(tiny_llama: Path, protocol: Protocol, images: Path, tmp_path: Path) -> None:
    file = protocol(vlm("  dataset: images\n"))
    with pytest.raises(ModelSlimError) as caught:
        quantize(tiny_llama, tmp_path / "out", file, device="cpu")
    assert f"{images}/a.jpg" in caught.value.message and "the model takes no image" in caught.value.message
    assert not (tmp_path / "out").exists()
