# SPDX-License-Identifier: Apache-2.0
"""`verify --engine transformers` asks transformers itself, which says the same as when it loads the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from modelslim.api import PlannedModel
from modelslim.verify import Verification, verify
from modelslim_compressed_tensors import in_transformers
from modelslim_compressed_tensors.in_transformers import ask_transformers

Source = Callable[..., Path]
Result = Callable[..., Path]
Process = Callable[..., dict[str, Any]]

NO_MODEL = PlannedModel({}, "float32", {}, {}, frozenset())
LINEAR = "model.layers.1.mlp.up_proj"


def ask(path: Path) -> tuple[list[str], Verification]:
    """What transformers refuses, and all that was found."""
    found = verify(path, engine="transformers")
    assert found.asked.startswith("transformers ") and "compressed-tensors" in found.asked
    assert not found.by_contract
    return [problem.message for problem in found.faults if problem.message.startswith(found.asked)], found


def loads(path: Path) -> bool:
    """Whether transformers loads the checkpoint and uses all of it."""
    try:
        _, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    except RuntimeError:
        return False
    return not any(report.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_says_of_every_scheme_what_loading_says(
    scheme: str, dtype: str, source: Source, result: Result, process: Process, capfd: pytest.CaptureFixture[str]
) -> None:
    path = result(source(dtype=dtype), process(scheme))
    capfd.readouterr()
    refused, _ = ask(path)
    assert capfd.readouterr() == ("", ""), "no reports and progress bars"
    assert (not refused) == loads(path), refused


@pytest.mark.parametrize("name", ["w4a16-group", "fp8-weight", "dynamic", "fp8-static", "mxfp8-weight"])
def test_it_says_of_experts_what_loading_says(name: str, source: Source, result: Result, process: Process) -> None:
    path = result(source("qwen3_moe", "bfloat16"), process(name, include=["*experts*"]))
    refused, _ = ask(path)
    assert (not refused) == loads(path), refused
    assert all("model.layers." in message for message in refused)


def test_zero_points_that_it_reads_in_another_shape_are_named(source: Source, result: Result, process: Process) -> None:
    refused, _ = ask(result(source(), process("w4a16-group-asymmetric")))
    assert any(f"wants {LINEAR}.weight_zero_point in the shape [256, 4], and it is [32, 4]" in one for one in refused)


def without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def renamed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}s"] = tensors.pop(name)


def transposed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].t().contiguous()


def as_bytes(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].view(torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without, "wants {}, and nothing in the checkpoint makes it"),
        (renamed, "has no place for {}s and would pass over it"),
        (transposed, "wants {} in the shape [256, 128], and it is [128, 256]"),
        (as_bytes, "wants {} in int8, and it is uint8"),
    ],
)
def test_every_difference_is_named(
    change: Callable[[dict[str, Tensor], str], None],
    says: str,
    tmp_path: Path,
    source: Source,
    result: Result,
    process: Process,
) -> None:
    path = tmp_path / "changed"
    shutil.copytree(result(source(), process("static"), part_file_size=0), path)
    tensors = load_file(path / "model.safetensors")
    name = f"{LINEAR}.weight"
    change(tensors, name)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    # Other checks of `verify` find most of this first; here it is transformers that must.
    answer = ask_transformers(path, NO_MODEL, {name: one.to("meta") for name, one in tensors.items()})
    messages = [problem.message for problem in answer.problems if problem.fatal]
    assert any(says.format(name) in message for message in messages), messages


def test_experts_that_it_would_leave_at_random_are_named(source: Source, result: Result, process: Process) -> None:
    refused, _ = ask(result(source("qwen3_vl_moe"), process("w4a16", include=["*experts*"])))
    assert any("wants model.language_model.layers.1.mlp.experts.gate_up_proj, and nothing" in one for one in refused)


def test_an_installed_version_other_than_the_named_one_warns(source: Source, result: Result, process: Process) -> None:
    path = result(source(), process("w4a16-asymmetric"))
    (asked,) = {verify(path, engine=name).asked for name in ("transformers", "transformers-5.23")}
    told = [one for one in verify(path, engine="transformers-5.23").problems if one.message.startswith(asked)]
    assert told and not any(problem.fatal for problem in told)


@pytest.mark.parametrize("package", ["compressed_tensors", "accelerate"])
def test_without_a_package_the_contract_is_checked_only(
    package: str, source: Source, result: Result, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = in_transformers.find_spec
    monkeypatch.setattr(in_transformers, "find_spec", lambda name: None if name == package else find(name))
    found = verify(result(source(), process("w4a16")), engine="transformers")
    assert (found.asked, found.faults) == ("", [])
    assert found.by_contract == f"{package.replace('_', '-')} cannot be imported"


def test_another_engine_is_not_asked(source: Source, result: Result, process: Process) -> None:
    found = verify(result(source(), process("w4a16")), engine="vllm")
    assert (found.asked, found.by_contract) == ("", "there is no way to ask vllm about this format")
    assert verify(result(source(), process("w4a16"))).by_contract == "", "nobody named an engine"
