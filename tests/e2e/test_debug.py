# SPDX-License-Identifier: Apache-2.0
"""What ``quant --debug`` keeps, against an independent computation, and what ``inspect`` shows of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelslim.hookspecs import hookimpl
from modelslim.run import quantize

Program = Callable[..., subprocess.CompletedProcess[str]]
WriteProtocol = Callable[[str], Path]
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def smoothed(w8a8_static: str) -> str:
    """The static protocol, smoothed first."""
    return w8a8_static.replace("  process:\n", "  process:\n    - type: flex_smooth_quant\n")


@pytest.fixture
def quant(here: Program, tiny_llama: Path, protocol: WriteProtocol, tmp_path: Path) -> Program:
    def run(text: str, *options: str) -> subprocess.CompletedProcess[str]:
        paths = ["--model_path", str(tiny_llama), "--save_path", str(tmp_path / "out")]
        return here("quant", *paths, "--config_path", protocol(text), "--device", "cpu", *options)

    return run


def inputs_of(model_path: Path, linear: str, texts: tuple[str, ...]) -> torch.Tensor:
    """What flows into a linear in transformers' own model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    seen: list[torch.Tensor] = []
    model.get_submodule(linear).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    return torch.cat(seen)


def test_ranges_divisors_and_scales_are_those_of_the_run(
    quant: Program,
    here: Program,
    smoothed: str,
    tiny_llama: Path,
    calibration_texts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    assert quant(smoothed, "--debug").returncode == 0
    folder = tmp_path / "out" / "debug_info"
    tensors = load_file(folder / "unit-00001.safetensors")
    x = inputs_of(tiny_llama, Q_PROJ, calibration_texts)
    divisor = tensors[f"{Q_PROJ}/input_divisor"]
    for word, float_range in (("minimum", x.amin(0)), ("maximum", x.amax(0))):
        assert torch.equal(tensors[f"{Q_PROJ}/float_input_{word}"], float_range)
        assert torch.allclose(tensors[f"{Q_PROJ}/input_{word}"], float_range.float() / divisor)
    # The static scale covers the divided range; the format stores it, and its product with the weight's.
    low, high = (tensors[f"{Q_PROJ}/input_{word}"] for word in ("minimum", "maximum"))
    step = (high.amax().clamp(min=0) - low.amin().clamp(max=0)) / 255
    assert torch.allclose(tensors[f"{Q_PROJ}/input_scale"], step, rtol=0.01)
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert torch.equal(tensors[f"{Q_PROJ}/input_scale"], stored[f"{Q_PROJ}.input_scale"].float())
    product = tensors[f"{Q_PROJ}/scale"].flatten() * tensors[f"{Q_PROJ}/input_scale"]
    assert torch.allclose(product, stored[f"{Q_PROJ}.deq_scale"].flatten())
    plan = json.loads((folder / "plan.json").read_text())
    assert {row["scheme"] for row in plan["weights"]} == {"W8A8", "FLOAT"}
    # What lies there disturbs neither loaders nor checks.
    assert here("verify", tmp_path / "out", "--float", tiny_llama).returncode == 0


def test_inspect_shows_linears_and_sums_up_tensors(
    quant: Program, here: Program, smoothed: str, tmp_path: Path
) -> None:
    assert quant(smoothed).returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    qualities = {name: one for unit in report["units"] for name, one in unit["quality"].items()}
    worst = max(qualities, key=lambda name: float(qualities[name]["relative_error"]))
    bound = 0.99 * qualities[worst]["relative_error"]
    (tmp_path / "out").rename(tmp_path / "before")
    strict = smoothed.replace("include:", f"fallback: {{above: {bound}}}\n      include:")
    assert quant(strict, "--debug").returncode == 0
    data = json.loads(here("inspect", tmp_path / "out", "--json").stdout)
    assert data["linears"].keys() == qualities.keys()
    fate = data["linears"][worst]
    assert (fate["scheme"], fate["fell_back"]["from"], fate["spec"]) == ("FLOAT", "W8A8", None)
    people = here("inspect", tmp_path / "out").stdout
    assert re.search(rf"{re.escape(worst)} +FLOAT +fell back from W8A8 to FLOAT", people)
    tensors = load_file(tmp_path / "out" / "debug_info" / "unit-00001.safetensors")
    name = f"{Q_PROJ}/input_divisor"
    one = data["tensors"][name]
    assert (one["dtype"], one["shape"]) == ("float32", list(tensors[name].shape))
    assert one["mean"] == pytest.approx(tensors[name].double().mean().item())
    assert "values" not in one and len(data["tensors"][f"{Q_PROJ}/scale"]["shape"]) == 2
    done = here("inspect", tmp_path / "out" / "debug_info", "*layers.1.*q_proj")
    assert done.returncode == 0
    assert re.search(rf"{re.escape(Q_PROJ)} +\S+ +\d\.\d{{4}}", done.stdout)
    assert re.search(rf"{re.escape(name)} +float32 +64 +{one['minimum']:.4g} +{one['mean']:.4g}", done.stdout)
    some = json.loads(here("inspect", tmp_path / "out", "*/input_divisor", "--json").stdout)
    assert some["tensors"].keys() == {key for key in data["tensors"] if key.endswith("/input_divisor")}
    done = here("inspect", tmp_path / "out", "q_porj")
    assert done.returncode == 2 and "did you mean 'q_proj'?" in done.stderr


def test_without_debug_nothing_is_kept_and_inspect_says_how(
    quant: Program, here: Program, w8a8_static: str, tmp_path: Path
) -> None:
    assert quant(w8a8_static).returncode == 0
    assert not (tmp_path / "out" / "debug_info").exists()
    done = here("inspect", tmp_path / "out")
    assert done.returncode == 2
    assert "modelslim quant --debug" in done.stderr


def test_debug_changes_no_byte_of_the_result(
    quant: Program, smoothed: str, tmp_path: Path, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    def result(*options: str) -> dict[str, str]:
        assert quant(smoothed, *options).returncode == 0
        files = snapshot(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out{len(options)}")
        return {name: one for name, one in files.items() if not name.startswith(("report.", "debug_info"))}

    assert result() == result("--debug")


class Breaks:
    """Ends the run when its second unit is done."""

    @hookimpl
    def unit_finished(self, index: int) -> None:
        if index == 1:
            raise ZeroDivisionError


@pytest.mark.parametrize("debug", [True, False])
def test_an_interrupted_run_keeps_what_it_knew_and_one_without_debug_says_what_is_missing(
    debug: bool, tiny_llama: Path, protocol: WriteProtocol, smoothed: str, here: Program, tmp_path: Path
) -> None:
    config, save = protocol(smoothed), tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        quantize(tiny_llama, save, config, device="cpu", debug=debug, observers=[("breaks", Breaks())])
    paths = ("--model_path", tiny_llama, "--save_path", save, "--config_path", config)
    done = here("quant", *paths, "--device", "cpu", "--debug")
    assert done.returncode == 0 and "continuing" in done.stderr
    assert ("done without --debug and are not in debug_info" in done.stderr) is not debug
    kept = json.loads(here("inspect", save, "--json").stdout)["linears"]
    units = {one["unit"] for one in kept.values()}
    assert "model.layers.2" in units and ("model.layers.0" in units) is debug
