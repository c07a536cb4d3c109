# SPDX-License-Identifier: Apache-2.0
"""Runners: which one is chosen, and that what they hold where changes no byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelslim.loader import Loader
from modelslim.protocol.model import Protocol
from modelslim.protocol.validate import read_protocol
from modelslim.registry import Registry
from modelslim.run import quantize
from modelslim.runners.choice import choose_runner

QUANT = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8, method: gptq}}}"
TEXT = "apiversion: {kind}\nspec:\n  runner: {runner}\n  process: [{quant}]\n  save: [{{type: ascendv1_saver}}]\n"


@pytest.fixture
def read(protocol: Callable[[str], Path]) -> Callable[..., Protocol]:
    """``read(runner, kind)`` -> a protocol that asks for the runner."""

    def make(runner: str, kind: str = "modelslim_v1") -> Protocol:
        found, problems = read_protocol(protocol(TEXT.format(kind=kind, runner=runner, quant=QUANT)), Registry.scan())
        assert found is not None, problems
        return found

    return make


@pytest.mark.parametrize(
    ("asked", "ranks", "taken"),
    [
        ("auto", 1, "layer_wise"),
        ("auto", 4, "dp_layer_wise"),
        ("layer_wise", 1, "layer_wise"),
        ("model_wise", 1, "model_wise"),
        ("dp_layer_wise", 2, "dp_layer_wise"),
        ("dp_layer_wise", 1, "dp_layer_wise"),
    ],
)
def test_the_runner_is_the_one_that_is_asked_for_or_fits_the_devices(
    asked: str, ranks: int, taken: str, read: Callable[..., Protocol]
) -> None:
    choice = choose_runner(read(asked), ranks, Registry.scan())
    assert (choice.name, choice.warnings, choice.refusals) == (taken, (), ())
    assert choice.why


@pytest.mark.parametrize("asked", ["layer_wise", "model_wise"])
def test_a_runner_of_one_device_is_refused_for_several(asked: str, read: Callable[..., Protocol]) -> None:
    (refusal,) = choose_runner(read(asked), 2, Registry.scan()).refusals
    assert refusal.message == f"{asked} uses one device, and 2 are to share the run"
    assert (refusal.path, refusal.line, refusal.hint) == ("spec.runner", 3, "say dp_layer_wise or auto")


def test_multimodal_models_are_shared_whatever_the_protocol_says(read: Callable[..., Protocol]) -> None:
    kind, registry = "multimodal_vlm_modelslim_v1", Registry.scan()
    assert choose_runner(read("layer_wise", kind), 2, registry).name == "dp_layer_wise"
    choice = choose_runner(read("model_wise", kind), 2, registry)
    assert choice.name == "dp_layer_wise"
    assert "'model_wise' becomes dp_layer_wise" in choice.warnings[0]


def test_a_whole_model_gives_the_same_bytes_and_is_read_first(
    tiny_llama: Path,
    calibration_file: Path,
    protocol: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files: dict[str, dict[str, bytes]] = {}
    events: list[str] = []
    install, release = Loader.install, Loader.release

    def installed(loader: Loader, tensors: Any) -> None:
        events.extend(f"read {name}" for name in tensors if name.endswith("q_proj.weight"))
        install(loader, tensors)

    def released(loader: Loader, names: Any) -> None:
        names = list(names)
        events.extend(f"release {name}" for name in names if name.endswith("q_proj.weight"))
        release(loader, names)

    monkeypatch.setattr(Loader, "install", installed)
    monkeypatch.setattr(Loader, "release", released)
    for runner in ("layer_wise", "model_wise"):
        events.clear()
        text = TEXT.format(kind="modelslim_v1", runner=runner, quant=QUANT) + f"  dataset: {calibration_file}\n"
        report = quantize(tiny_llama, tmp_path / runner, protocol(text), device="cpu")
        assert report["runner"] == runner
        order = [event.split()[0] for event in events if "layers" in event][-6:]
        assert order == (["read"] * 3 + ["release"] * 3 if runner == "model_wise" else ["read", "release"] * 3)
        files[runner] = {
            file.name: file.read_bytes() for file in (tmp_path / runner).iterdir() if file.name != "report.json"
        }
    one, other = files.values()
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one)
