# SPDX-License-Identifier: Apache-2.0
"""A memory budget: how it is written, what it decides, what it refuses, and that results do not know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelslim import memory, plan_costs
from modelslim.costs import Layout, peaks, phases
from modelslim.errors import UsageError
from modelslim.machines import CPU
from modelslim.memory import Budget, in_words, parse_budget
from modelslim.plan import make_plan
from modelslim.run import quantize
from modelslim.runners import engine
from modelslim.spill import make_spill

QUANT = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
STEPS = {
    "static": QUANT,
    "gptq": QUANT.replace("int8}}}", "int8, method: gptq}}}"),
    "smooth and histogram": "{type: iter_smooth, alpha: 0.5}, "
    + QUANT.replace("per_tensor", "per_tensor, method: histogram"),
    "autoround": "{type: autoround_quant, iters: 2, "
    "strategies: [{qconfig: {act: {dtype: float}, weight: {dtype: int8}}}]}",
}

Protocol = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("24GiB", 24 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("8gb", 8_000_000_000),
        ("cpu=2TiB", 2 << 40),
        ("4096B", 4096),
    ],
)
def test_a_size_with_its_unit_is_a_budget_of_the_host(text: str, host: int) -> None:
    assert parse_budget(text) == Budget(host)


def test_devices_have_sizes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelslim.devices._count", lambda kind: 2 if kind == "cuda" else 0)
    assert parse_budget("24GiB, cuda:1=60GiB") == Budget(24 << 30, {"cuda:1": 60 << 30})
    assert parse_budget("cuda=60GiB") == Budget(None, {"cuda:0": 60 << 30})
    assert parse_budget(None) == Budget()
    with pytest.raises(UsageError, match=r"gives cuda:0 two sizes"):
        parse_budget("cuda=60GiB,cuda:0=50GiB")


@pytest.mark.parametrize("text", ["", "24", "GiB", "24iB", "24GiBs", "-1GiB", "24GiB,", "=24GiB", "0GiB", "1GiB,2GiB"])
def test_anything_else_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="--max_memory") as caught:
        parse_budget(text)
    assert "24GiB" in caught.value.hint


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="'tpu:0' is no device of this machine"):
        parse_budget("24GiB,tpu:0=60GiB")


def test_sizes_are_told_in_words() -> None:
    assert [in_words(size) for size in (800, 52_428_800, 4.2e9, 812e9)] == ["1 kB", "52.4 MB", "4.2 GB", "812 GB"]


def text_of(steps: str, calibration_file: Path) -> str:
    return (
        f"apiversion: modelslim_v1\nspec:\n  process: [{steps}]\n"
        f"  save: [{{type: ascendv1_saver}}]\n  dataset: {calibration_file}\n"
    )


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.iterdir()) if file.name not in ("report.html", "report.json"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("propagation", ["float", "quantized"])
def test_activations_in_a_file_give_the_same_bytes(
    kind: str,
    propagation: str,
    tiny_llama: Path,
    calibration_file: Path,
    protocol: Protocol,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a budget that the fixed costs alone would not keep to, since the model is tiny."""
    monkeypatch.setattr("modelslim.costs.FIXED_BYTES", 0)
    monkeypatch.setattr("modelslim.costs.CHUNK_BYTES", 0)
    monkeypatch.setattr("modelslim.spill._LEAST", 64)
    config = protocol(text_of(STEPS[kind], calibration_file) + f"  propagation: {propagation}\n")
    free = quantize(tiny_llama, tmp_path / "free", config, device="cpu")
    assert (free["memory"]["activations"], free["memory"]["budget_bytes"]) == ("host", {})
    least = least_budget(tiny_llama, config)
    if kind == "autoround":  # wants all calls in memory, so that a file saves nothing, and none is taken
        monkeypatch.setattr(engine, "make_spill", lambda _, *others: make_spill(Layout("file"), *others))
    tight = quantize(tiny_llama, tmp_path / "tight", config, device="cpu", max_memory=f"{least}B")
    assert (tight["memory"]["reads_ahead"], tight["memory"]["budget_bytes"]) == (False, {"host": least})
    assert tight["memory"]["activations"] == ("host" if kind == "autoround" else "file")
    assert digests(tmp_path / "tight") == digests(tmp_path / "free")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["free", "tight"]


def least_budget(model: Path, config: Path) -> int:
    """What the layout that holds least is expected to hold."""
    job = make_plan(model, config, device="cpu").costs.job
    return peaks(phases(job, CPU, Layout("file", ahead=False)))["host"].host_bytes


def test_what_cannot_fit_is_refused_with_its_largest_part_and_the_remedy(
    tiny_llama: Path, calibration_file: Path, protocol: Protocol, tmp_path: Path
) -> None:
    config = protocol(text_of(STEPS["static"], calibration_file))
    with pytest.raises(
        UsageError, match=r"--max_memory of 1.0 MB is too little: .* MB are kept by the allocator"
    ) as caught:
        quantize(tiny_llama, tmp_path / "out", config, device="cpu", max_memory="1MB")
    assert caught.value.hint.startswith("give it ")
    assert not (tmp_path / "out.partial").exists()


def test_the_plan_knows_tokens_units_and_multiplications(
    tiny_llama: Path, calibration_file: Path, calibration_texts: tuple[str, ...], protocol: Protocol
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = make_plan(tiny_llama, protocol(text_of(STEPS["gptq"], calibration_file)), device="cpu")
    job = plan.costs.job
    lengths = [len(AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]) for text in calibration_texts]
    assert (job.samples, job.tokens, job.longest) == (6, sum(lengths), max(lengths))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for unit, layer in zip(job.units, model.model.layers, strict=True):
        linears = [one.weight for one in layer.modules() if isinstance(one, torch.nn.Linear)]
        assert unit.macs == unit.values == sum(one.numel() for one in linears)
        assert unit.largest == max(one.numel() for one in linears)
        assert unit.stored_bytes == unit.held_bytes == 2 * sum(one.numel() for one in layer.parameters())
        assert unit.largest_gram == 96**2 and unit.gram_updates == 6 * 64**2 + 96**2
        assert unit.passes == 2  # to measure, and to hand on what was quantized
    assert job.outside_bytes == 2 * (512 * 64 + 64) and job.hidden_bytes == 2 * 64
    assert job.copied_bytes == 2 * (2 * 512 * 64 + 64)


def test_a_token_meets_only_some_experts(tiny_moe: Path, calibration_file: Path, protocol: Protocol) -> None:
    plan = make_plan(tiny_moe, protocol(text_of(STEPS["static"], calibration_file)), device="cpu")
    attention, expert = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 32
    for unit in plan.costs.job.units:
        assert (unit.values, unit.macs) == (attention + 4 * expert, attention + 2 * expert)


def test_the_fastest_layout_that_fits_is_taken(
    tiny_llama: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"  # many samples, each of another length: four of them are on the device at most
    data.write_text("".join(json.dumps({"text": "a river " * count}) + "\n" for count in range(10, 34)))
    config = protocol(text_of(STEPS["static"], data))
    monkeypatch.setattr(plan_costs, "is_host", lambda device: False)
    free: dict[str, Any] = {"bytes": 1 << 40}
    monkeypatch.setattr(plan_costs, "free_memory", lambda device: free["bytes"])
    roomy = make_plan(tiny_llama, config, device="cpu").costs
    assert (roomy.layout.activations, roomy.layout.ahead, roomy.layout.separate) == ("device", True, True)
    apart = phases(roomy.job, roomy.machine, Layout("device", ahead=False, separate=True))
    free["bytes"] = int(peaks(apart)["device"].device_bytes / 0.9) - 10  # too little even without reading ahead
    assert make_plan(tiny_llama, config, device="cpu").costs.layout.activations == "host"


@pytest.mark.parametrize(
    ("is_scarce", "trims"),
    [
        # What the first unit needs is usual; growth is given back, and what the next unit then needs is usual.
        (False, [False, False, True, False, False, True]),
        # All that has come together is given back, from the first look on.
        (True, [True, True, True, True, True, True]),
    ],
)
def test_freed_memory_is_given_back_where_it_grows_or_is_scarce(
    is_scarce: bool, trims: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0
    calls = 0

    class Library:
        @staticmethod
        def mallopt(_option: int, _value: int) -> int:
            assert not is_scarce
            return 1

        @staticmethod
        def malloc_trim(_pad: int) -> int:
            nonlocal now, calls
            calls += 1
            now = 100 << 20
            return 1

    monkeypatch.setattr(memory, "_gnu_library", Library)
    monkeypatch.setattr(memory, "resident_memory", lambda _field: now)
    trimmer = memory.Trimmer(is_scarce=is_scarce)
    found = []
    for held in (200, 210, 220, 230, 240, 250):
        now, before = held << 20, calls
        trimmer.look()
        found.append(calls > before)
    assert found == trims


def test_where_another_library_is_in_use_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_gnu_library", lambda: None)
    memory.Trimmer(is_scarce=True).look()
    memory.Trimmer(is_scarce=False).look()
