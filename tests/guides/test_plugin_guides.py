# SPDX-License-Identifier: Apache-2.0
"""The plugins of the guides for algorithm author, saver author and vendor are files that pass the contracts and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tomllib
import torch
from safetensors.torch import load_file

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
LISTING = re.compile(r"<!-- file: (?P<file>\S+) -->\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

Write = Callable[[str], Path]
LlamaFactory = Callable[..., Path]

INT8 = """
apiversion: modelslim_v1
spec:
  process: [{type: linear_quant, qconfig: {weight: {dtype: int8}}, include: ["*"]}]
  save: [{type: SAVER}]
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the files of a guide, with what pip would leave behind of the distribution."""

    def files_of(guide: str) -> Path:
        folder = tmp_path / guide
        listings = LISTING.findall((GUIDES / f"{guide}.md").read_text(encoding="utf-8"))
        for name, text in listings:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            if file.parent != folder:
                (file.parent / "__init__.py").touch()
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".format(**project))
        groups = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(groups) + "\n")
        return folder

    return files_of


def run(folder: Path, *words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A Python program in that folder, which is on its path."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("guide", "least"), [("algorithm_author", 20), ("saver_author", 50)])
def test_plugin_passes_its_contract(guide: str, least: int, write: Write) -> None:
    done = run(write(guide), "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= least


def test_algorithm_quantizes_a_model(write: Write, tiny_llama: Path) -> None:
    folder = write("algorithm_author")
    text = (GUIDES / "algorithm_author.md").read_text(encoding="utf-8")
    (folder / "clip.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    words = ["--model_path", tiny_llama, "--config_path", "clip.yaml", "--device", "cpu", "--json"]
    done = run(folder, "modelslim", "quant", *words, "--save_path", "result")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert list(report["schemes"]) == ["W8A16"]
    assert report["samples"] == 0
    wrong = (folder / "clip.yaml").read_text().replace("keep: 0.9999", "keep: 1.5")
    (folder / "clip.yaml").write_text(wrong)
    done = run(folder, "modelslim", "quant", *words, "--save_path", "other")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["diagnostics"][0]["path"] == "spec.process[0].keep"


def test_saver_writes_what_can_be_verified_and_converted(write: Write, tiny_llama: Path) -> None:
    folder = write("saver_author")
    (folder / "acme.yaml").write_text(INT8.replace("SAVER", "acme_saver"))
    words = ["--model_path", tiny_llama, "--config_path", "acme.yaml", "--device", "cpu"]
    done = run(folder, "modelslim", "quant", *words, "--save_path", "result")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(folder, "modelslim", "verify", "result", "--float", tiny_llama)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "acme.yaml").write_text(INT8.replace("SAVER", "compressed_tensors_saver"))
    assert run(folder, "modelslim", "quant", *words, "--save_path", "there").returncode == 0
    for source, target, saver in (("there", "here", "acme_saver"), ("here", "back", "compressed_tensors_saver")):
        done = run(folder, "modelslim", "convert", source, "--save_path", target, "--to", saver)
        assert done.returncode == 0, done.stderr[-3000:]
    there, back = (load_tensors(folder / name) for name in ("there", "back"))
    assert there.keys() == back.keys()
    assert [name for name, tensor in there.items() if not torch.equal(tensor, back[name])] == []
    (folder / "acme.yaml").write_text(INT8.replace("SAVER", "acme_saver").replace("int8", "int4"))
    done = run(folder, "modelslim", "plan", *words)
    assert done.returncode == 2
    assert "the format of Acme has no W4A16" in done.stderr


def test_vendor_has_an_engine_a_practice_and_an_observer(write: Write, tiny_llama: Path) -> None:
    folder = write("vendor")
    log = folder / "runs.jsonl"
    done = run(folder, "modelslim", "practices", "why", "--model_type", "llama", "--quant_type", "w8a16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "acme_w8a16" in done.stdout + done.stderr
    text = INT8.replace("SAVER", "compressed_tensors_saver")
    (folder / "good.yaml").write_text(text)
    (folder / "wrong.yaml").write_text(text.replace("int8", "int4"))
    words = ["--model_path", tiny_llama, "--device", "cpu", "--engine", "acme"]
    done = run(folder, "modelslim", "plan", *words, "--config_path", "wrong.yaml")
    assert done.returncode == 2
    assert "[acme-1.0: schemes]" in done.stderr
    words = [*words, "--config_path", "good.yaml", "--save_path", "result"]
    done = run(folder, "modelslim", "quant", *words, env={"ACME_LOG": str(log)})
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = log.read_text().splitlines()
    assert json.loads(line)["result"].endswith("result")


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_guides_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
