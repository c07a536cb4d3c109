# SPDX-License-Identifier: Apache-2.0
"""A third party's adapter as a wheel beside the released wheels: found, used, held to its contract, uninstalled.

The environment in which this happens sees the libraries of the outer one, and nothing of ModelSlim but wheels.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from modelslim.testing.adapter import AdapterContract

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOREIGN = HERE / "acme-gpt"
SOURCES = {
    "core": ROOT,
    "linear-quant": ROOT / "plugins" / "algorithms" / "linear-quant",
    "ascendv1": ROOT / "plugins" / "savers" / "ascendv1",
    "acme-gpt": FOREIGN,
}
BY_MODEL_TYPE = ()
BY_PUBLISHED_NAME = ("--model_type", "Acme-GPT-Nano")
PROTOCOL = """\
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
TEXTS = ("Wheels within wheels.", "A second text.")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels, built from copies, so that nothing is left in the sources or taken from earlier builds."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    leftovers = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "tests")
    for name, source in SOURCES.items():
        (sources / name).mkdir()
        for part in ("pyproject.toml", "README.md", "LICENSE", "core", "schemas", *source.glob("modelslim_*")):
            if (source / part).is_dir():
                shutil.copytree(source / part, sources / name / Path(part).name, ignore=leftovers)
            elif (source / part).exists():
                shutil.copy(source / part, sources / name)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out]
    pip(*command, *(sources / name for name in SOURCES))
    built = sorted(out.glob("*.whl"))
    assert len(built) == len(SOURCES)
    return built


@pytest.fixture(scope="session")
def python(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheels, and links to what is installed outside but ModelSlim."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    inner = root / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([inner, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    libraries = root / "libraries"
    libraries.mkdir()
    for folder in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        for entry in Path(folder).iterdir():
            # .pth files are left out too: of a folder that a .pth file names, Python reads none.
            if not entry.name.startswith(("modelslim", "__editable__", "__pycache__")) and entry.suffix != ".pth":
                (libraries / entry.name).symlink_to(entry)
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    pip("--python", inner, "install", "--no-deps", "--no-index", *wheels)
    return inner


@pytest.fixture(scope="session")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run("-m", "pytest", ...)``: the environment's Python, in a folder that holds nothing of the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MODELSLIM"))}

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in (python, *arguments)]
        return subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=300)

    return call


@pytest.fixture(scope="session")
def modelslim(run: Run, python: Path) -> Run:
    """``modelslim("quant", ...)``: the program that the core's wheel installs."""
    return lambda *words: run(python.parent / "modelslim", *words)


@pytest.fixture(scope="session")
def checkpoint(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the foreign family, written by the foreign distribution's own code."""
    path = tmp_path_factory.mktemp("acme")
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window": 4, "max_positions": 64, "dtype": "float32"}
    config = {"model_type": "acme_gpt", "architectures": ["AcmeGPT"], **sizes}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    script = (
        "import json, sys, torch; from safetensors.torch import save_file\n"
        "from modelslim_acme_gpt.model import AcmeGPT, Config\n"
        "torch.manual_seed(0); path = sys.argv[1]\n"
        "state = AcmeGPT(Config.of(json.load(open(f'{path}/config.json')))).state_dict()\n"
        "state = {name: torch.randn_like(tensor) * 0.3 for name, tensor in state.items()}\n"
        "save_file(state, f'{path}/model.safetensors')"
    )
    done = run("-c", script, path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol that calibrates, beside its data."""
    folder = tmp_path_factory.mktemp("protocol")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "calibration.jsonl").write_text(lines, encoding="utf-8")
    (folder / "protocol.yaml").write_text(PROTOCOL, encoding="utf-8")
    return folder / "protocol.yaml"


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_foreign_distribution_imports_nothing_of_the_core_but_its_public_modules() -> None:
    imported = set()
    for file in FOREIGN.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
    ours = {name for name in imported if name.partition(".")[0] == "modelslim"}
    assert ours == {"modelslim.api", "modelslim.testing.adapter"}


def test_environment_holds_the_wheels_and_no_other_modelslim(run: Run, python: Path) -> None:
    done = run("-c", "import modelslim, modelslim_acme_gpt; print(modelslim.__file__, modelslim_acme_gpt.__file__)")
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(python.parents[1]) for file in done.stdout.split())


def test_plugins_lists_the_foreign_adapter_under_both_names(modelslim: Run) -> None:
    done = modelslim("plugins", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["plugins"]
    foreign = {(row["kind"], row["name"], row["version"], row["status"]) for row in rows if "acme" in row["value"]}
    assert foreign == {("adapters", "acme_gpt", "1.2.0", "ok"), ("models", "Acme-GPT-Nano", "1.2.0", "ok")}
    assert {row["distribution"] for row in rows} == {
        "modelslim", "modelslim-algorithm-linear-quant", "modelslim-saver-ascendv1", "modelslim-adapter-acme-gpt"
    }  # fmt: skip


@pytest.mark.parametrize("words", [BY_MODEL_TYPE, BY_PUBLISHED_NAME], ids=["by_model_type", "by_published_name"])
def test_quant_serves_the_foreign_family(
    words: tuple[str, ...], modelslim: Run, checkpoint: Path, protocol: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    paths = ("--model_path", checkpoint, "--save_path", result, "--config_path", protocol)
    done = modelslim("quant", "--device", "cpu", "--json", *paths, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["schemes"], report["samples"]) == ({"W8A8": 16}, 2)
    assert not [warning for warning in report["warnings"] if "forward" in warning]
    check_result(checkpoint, result)


def check_result(checkpoint: Path, result: Path) -> None:
    """Codes and scales by rounding of our own; activations by a forward of our own; the rest unchanged."""
    source = load_file(checkpoint / "model.safetensors")
    written = {name: array for file in result.glob("*.safetensors") for name, array in load_file(file).items()}
    inputs = linear_inputs(source)
    assert len(inputs) == 16
    for name, (low, high) in inputs.items():
        weight = source[f"{name}.weight"]
        scale = np.abs(weight).max(1, keepdims=True).astype(np.float32) / np.float32(127)
        # Half a step and what float32 loses near it.
        assert np.abs(written[f"{name}.weight"] - weight / scale).max() <= 0.5 + 1e-4
        assert written[f"{name}.weight"].dtype == np.int8
        step = (max(high, 0.0) - min(low, 0.0)) / 255
        np.testing.assert_allclose(written[f"{name}.input_scale"], step, rtol=1e-4)
        product = written[f"{name}.deq_scale"].astype(np.uint32).view(np.float32)  # the engine reads it as integers
        np.testing.assert_allclose(product, scale.reshape(-1) * written[f"{name}.input_scale"], rtol=1e-6)
        offset = -128 - min(low, 0.0) / step
        assert abs(written[f"{name}.input_offset"].astype(np.float64) - offset).max() <= 0.51
    quantized = {f"{name}.weight" for name in inputs}
    for name in source.keys() - quantized:
        assert np.array_equal(written[name], source[name]), name
    description = json.loads((result / "quant_model_description.json").read_text(encoding="utf-8"))
    assert {name for name, scheme in description.items() if scheme == "W8A8" and name.endswith(".weight")} == quantized


def linear_inputs(state: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The range of every linear's input over the calibration texts, by a forward in numpy and float64."""
    state = {name: array.astype(np.float64) for name, array in state.items()}
    seen: dict[str, list[Any]] = {}

    def linear(name: str, x: Any) -> Any:
        seen.setdefault(name, []).append(x)
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    for text in TEXTS:
        ids = np.array([0, *(byte + 1 for byte in text.encode("utf-8"))])
        position = np.arange(len(ids))
        behind = position[:, None] - position[None, :]
        hidden = state["tokens.weight"][ids] + state["positions.weight"][position]
        for index in range(4):
            layer = f"layers.{index}"
            normed = hidden - hidden.mean(-1, keepdims=True)
            normed = normed / np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-5)
            normed = normed * state[f"{layer}.norm.weight"] + state[f"{layer}.norm.bias"]
            query, key, value = linear(f"{layer}.qkv", normed).reshape(-1, 3, 4, 8).transpose(1, 2, 0, 3)
            scores = query @ key.transpose(0, 2, 1) / np.sqrt(8)
            visible = (behind >= 0) & (behind < (len(ids) if index % 2 else 4))
            weights = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
            heads = weights / weights.sum(-1, keepdims=True) @ value
            attended = linear(f"{layer}.out", heads.transpose(1, 0, 2).reshape(-1, 32))
            wide = torch.nn.functional.gelu(torch.from_numpy(linear(f"{layer}.up", normed))).numpy()
            hidden = hidden + attended + linear(f"{layer}.down", wide)
    return {name: (min(x.min() for x in xs), max(x.max() for x in xs)) for name, xs in seen.items()}


def test_foreign_contract_tests_pass_where_it_is_installed(run: Run, tmp_path: Path) -> None:
    shutil.copytree(FOREIGN / "tests", tmp_path / "tests")
    done = run("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path / "tests")
    assert done.returncode == 0, done.stdout
    expected = sum(name.startswith("test_") for name in dir(AdapterContract)) + 1
    # The foreign adapter says nothing of subgraphs for smoothing, so there is nothing to prove about them.
    assert f"{expected - 1} passed, 1 skipped" in done.stdout


@pytest.fixture(scope="session")
def without_the_foreign_one(python: Path) -> Callable[[], None]:
    """Uninstall the foreign distribution, once; the tests below need it and the ones above do not."""
    gone: list[bool] = []

    def uninstall() -> None:
        if not gone:
            pip("--python", python, "uninstall", "--yes", "modelslim-adapter-acme-gpt")
            gone.append(True)

    return uninstall


@pytest.mark.parametrize("words", [BY_MODEL_TYPE, BY_PUBLISHED_NAME], ids=["by_model_type", "by_published_name"])
def test_without_it_quant_says_what_is_missing_and_how_to_get_it(
    words: tuple[str, ...],
    without_the_foreign_one: Callable[[], None],
    modelslim: Run,
    checkpoint: Path,
    protocol: Path,
    tmp_path: Path,
) -> None:
    without_the_foreign_one()
    result = tmp_path / "result"
    paths = ("--model_path", checkpoint, "--save_path", result, "--config_path", protocol)
    done = modelslim("quant", "--device", "cpu", "--json", *paths, *words)
    assert done.returncode == 3, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "PluginError"
    assert "no installed adapter serves" in error["message"]
    assert all(name in error["message"] for name in ("acme_gpt", *words[1:]))
    assert "modelslim-adapter-" in error["hint"]
    assert not list(tmp_path.iterdir())


def test_without_it_plugins_lists_the_others(without_the_foreign_one: Callable[[], None], modelslim: Run) -> None:
    without_the_foreign_one()
    done = modelslim("plugins", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["plugins"]
    assert "linear_quant" in {row["name"] for row in rows}
    assert not [row for row in rows if "acme" in row["value"]]
