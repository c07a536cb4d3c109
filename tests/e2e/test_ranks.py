# SPDX-License-Identifier: Apache-2.0
"""Several processes share a run: the same bytes as one alone, and nothing is left behind when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelslim.api import hookimpl
from modelslim.costs import Layout, peaks, phases
from modelslim.errors import ProtocolError, RankError
from modelslim.plan import make_plan
from modelslim.run import quantize

VLM = Path(__file__).parents[1] / "models" / "qwen3-vl-moe-tiny"

Snapshot = Callable[[Path], dict[str, str]]
Protocol = Callable[[str], Path]

STATIC = "{type: linear_quant, qconfig: {act: {scope: per_tensor, symmetric: false}, weight: {dtype: int8}}}"
HISTOGRAM = STATIC.replace("symmetric: false", "method: histogram")
SMOOTH = "{type: iter_smooth, alpha: 0.5}"
FLEX = "{type: flex_smooth_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
GPTQ = (
    "{type: linear_quant, qconfig: {act: {dtype: float}, "
    "weight: {dtype: int4, scope: per_group, method: gptq, ext: {group_size: 32}}}}"
)
AUTOROUND = "{type: autoround_quant, iters: 2, strategies: [{qconfig: {act: {dtype: float}, weight: {dtype: int8}}}]}"
EXPERTS = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8, method: gptq}}}"
PRUNE = "{type: float_sparse}"
HEAD = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}, include: [lm_head]}"
CACHE = "{type: dynamic_cache, qconfig: {dtype: int8, scope: per_channel}}"


@pytest.fixture(scope="session")
def long_calibration(tmp_path_factory: pytest.TempPathFactory, calibration_texts: tuple[str, ...]) -> Path:
    """Enough tokens for five groups of samples, whose lengths differ."""
    file = tmp_path_factory.mktemp("calibration") / "long.jsonl"
    texts = [" ".join(calibration_texts[index % 6 :]) for index in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def text(dataset: Path, *entries: str, save: str = "{type: ascendv1_saver}", more: str = "") -> str:
    process = "".join(f"    - {entry}\n" for entry in entries)
    return f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save: [{save}]\n  dataset: {dataset}\n{more}"


def numbers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of the units, times aside."""
    measured = {"seconds", "peak_memory_bytes", "peak_device_memory_bytes"}
    return [{key: value for key, value in unit.items() if key not in measured} for unit in report["units"]]


def same(folder: Path, other: Path, snapshot: Snapshot) -> bool:
    one, two = snapshot(folder), snapshot(other)
    reports = {"report.json": "", "report.html": ""}
    return one | reports == two | reports


@pytest.mark.parametrize(
    ("entries", "more", "workers"),
    [
        ([SMOOTH, STATIC], "", 2),
        ([FLEX, HISTOGRAM, HEAD, CACHE], "  propagation: quantized\n", 3),
        ([GPTQ], "", 2),
        ([AUTOROUND], "", 2),
        ([FLEX, AUTOROUND.replace("iters: 2", "iters: 2, batch_size: 3")], "", 3),
    ],
    ids=["smooth, static", "flex, histogram, head, cache", "gptq", "autoround", "autoround in batches"],
)
def test_the_number_of_ranks_changes_no_byte(
    entries: list[str],
    more: str,
    workers: int,
    tiny_llama: Path,
    protocol: Protocol,
    long_calibration: Path,
    tmp_path: Path,
    snapshot: Snapshot,
) -> None:
    config = protocol(text(long_calibration, *entries, more=more))
    alone = quantize(tiny_llama, tmp_path / "alone", config, device="cpu")
    shared = quantize(tiny_llama, tmp_path / "shared", config, device="cpu", workers=workers)
    assert same(tmp_path / "alone", tmp_path / "shared", snapshot)
    assert numbers(shared) == numbers(alone)
    assert shared["kl"] == alone["kl"] and alone["kl"]["units"]
    assert (shared["runner"], alone["runner"]) == ("dp_layer_wise", "layer_wise")
    assert psutil.Process().children(recursive=True) == []


def budget_for_a_file(model: Path, config: Path) -> str:
    """What two ranks need when their activations wait in files, and which is too little for them in memory."""
    costs = make_plan(model, config, device="cpu", ranks=2).costs
    held, in_file = (
        peaks(phases(costs.job, costs.machine, Layout(place, ahead=False, ranks=2)))["host"].host_bytes
        for place in ("host", "file")
    )
    assert in_file < held
    return f"{in_file + held}B"  # both share it


class Files:
    """Counts, while a unit is finished, the files without a name that each process has open in a folder."""

    def __init__(self, folder: Path, then: Callable[[], object] = lambda: None) -> None:
        self._folder = folder
        self._then = then
        self.counts: list[list[int]] = []

    @hookimpl
    def unit_finished(self) -> None:
        self.counts.append(nameless_files(self._folder))
        self._then()


def nameless_files(folder: Path) -> list[int]:
    """How many files in a folder each process of this run has open that have no name any more."""
    processes = [psutil.Process(), *psutil.Process().children()]
    counts = []
    for process in processes:
        links = []
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed by now
                links.append(str(descriptor.readlink()))
        counts.append(sum(link.startswith(str(folder)) and link.endswith("(deleted)") for link in links))
    return counts


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
@pytest.mark.parametrize("entries", [[SMOOTH, STATIC], [GPTQ]], ids=["smooth, static", "gptq"])
def test_ranks_whose_activations_wait_in_files_change_no_byte_and_leave_none(
    entries: list[str],
    tiny_llama: Path,
    protocol: Protocol,
    calibration_texts: tuple[str, ...],
    tmp_path: Path,
    snapshot: Snapshot,
) -> None:
    data = tmp_path / "lengths.jsonl"  # no two texts of one length, so that none pass together
    words = " ".join(calibration_texts)
    data.write_text("".join(json.dumps({"text": f"{words}{' a' * number}"}) + "\n" for number in range(20)))
    config = protocol(text(data, *entries))
    budget = budget_for_a_file(tiny_llama, config)
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def kill() -> None:
        psutil.Process().children()[0].kill()

    files = Files(partial, kill)
    with pytest.raises(RankError, match="killed by signal 9"):
        quantize(tiny_llama, out, config, device="cpu", workers=2, max_memory=budget, observers=[("files", files)])
    assert files.counts[0] == [1, 1]  # the plan of both ranks says so
    assert nameless_files(partial) == [0] and psutil.Process().children(recursive=True) == []
    left = {path.suffix for path in partial.iterdir() if path.is_file()}
    assert left <= {".safetensors", ".unfinished", ".jsonl"}

    files = Files(partial)
    report = quantize(tiny_llama, out, config, device="cpu", workers=2, max_memory=budget, observers=[("files", files)])
    assert report["memory"]["activations"] == "file" and [1, 1] in files.counts
    assert nameless_files(partial) == nameless_files(out) == [0]
    quantize(tiny_llama, tmp_path / "alone", config, device="cpu")
    assert same(out, tmp_path / "alone", snapshot)


@pytest.mark.parametrize("entry", [EXPERTS, PRUNE], ids=["gptq", "sparse float"])
def test_experts_are_shared_too(
    entry: str, tiny_moe: Path, protocol: Protocol, long_calibration: Path, tmp_path: Path, snapshot: Snapshot
) -> None:
    config = protocol(text(long_calibration, entry))
    alone = quantize(tiny_moe, tmp_path / "alone", config, device="cpu")
    shared = quantize(tiny_moe, tmp_path / "shared", config, device="cpu", workers=2)
    assert same(tmp_path / "alone", tmp_path / "shared", snapshot)
    assert numbers(shared) == numbers(alone)
    assert shared["kl"] == alone["kl"] and alone["kl"]["units"]


def test_images_are_shared_too(protocol: Protocol, tmp_path: Path, snapshot: Snapshot) -> None:
    """A vision tower that texts skip, one unit of its own, behind which the samples wait again."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    records: list[dict[str, str]] = [{"text": "A text without an image. " * 20}] * 3
    for index in range(24):
        Image.new("RGB", (96 + 32 * (index % 3), 96), (10 * index, 200, 250 - 10 * index)).save(folder / f"{index}.png")
        records.insert(2 * index, {"image": f"{index}.png", "text": "Describe this image in detail. " * 6})
    (folder / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = protocol(text(folder, SMOOTH, STATIC).replace("modelslim_v1", "multimodal_vlm_modelslim_v1"))
    alone = quantize(VLM, tmp_path / "alone", config, device="cpu")
    shared = quantize(VLM, tmp_path / "shared", config, device="cpu", workers=2)
    assert same(tmp_path / "alone", tmp_path / "shared", snapshot)
    assert numbers(shared) == numbers(alone)
    assert shared["kl"] == alone["kl"] and alone["kl"]["units"]
    assert min(unit["tokens"] for unit in shared["units"]) > 1024  # more than one group


class Killer:
    """Kills another rank when a unit is finished."""

    def __init__(self, index: int) -> None:
        self._index = index

    @hookimpl
    def unit_finished(self, index: int) -> None:
        if index == self._index:
            for child in psutil.Process().children():
                child.kill()


@pytest.mark.parametrize("entries", [[GPTQ], [SMOOTH, STATIC]], ids=["gptq", "smooth, static"])
def test_a_rank_that_is_killed_ends_the_run_which_can_be_continued(
    entries: list[str], tiny_llama: Path, protocol: Protocol, long_calibration: Path, tmp_path: Path, snapshot: Snapshot
) -> None:
    config = protocol(text(long_calibration, *entries))
    out = tmp_path / "out"
    with pytest.raises(RankError, match="rank 1 was killed by signal 9; the system does so when memory runs out"):
        quantize(tiny_llama, out, config, device="cpu", workers=2, observers=[("killer", Killer(0))])
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    assert psutil.Process().children(recursive=True) == []
    quantize(tiny_llama, out, config, device="cpu", workers=2)
    quantize(tiny_llama, tmp_path / "whole", config, device="cpu")
    assert same(out, tmp_path / "whole", snapshot)


def test_prior_stages_are_shared_and_continued_too(
    tiny_llama: Path,
    protocol: Protocol,
    long_calibration: Path,
    calibration_file: Path,
    tmp_path: Path,
    snapshot: Snapshot,
) -> None:
    attention = EXPERTS.removesuffix("}") + ', include: ["*self_attn*"]}'
    rest = STATIC.removesuffix("}") + ', include: ["*mlp*"]}'
    stages = f"  prior:\n    - {{process: [{SMOOTH}], dataset: {calibration_file}}}\n    - process: [{attention}]\n"
    config = protocol(text(long_calibration, rest, more=stages))
    alone = quantize(tiny_llama, tmp_path / "alone", config, device="cpu")
    for index in (3, 7):  # in the second stage, and in the main one
        out = tmp_path / f"out{index}"
        with pytest.raises(RankError, match="rank 1 was killed"):
            quantize(tiny_llama, out, config, device="cpu", workers=2, observers=[("killer", Killer(index))])
        assert (tmp_path / f"out{index}.partial" / "prior").is_dir()
        shared = quantize(tiny_llama, out, config, device="cpu", workers=2)
        assert same(out, tmp_path / "alone", snapshot)
        assert numbers(shared) == numbers(alone)
        assert shared["kl"] == alone["kl"] and alone["kl"]["units"]
        assert list(map(numbers, shared["prior"])) == list(map(numbers, alone["prior"]))


def test_what_is_wrong_for_all_ranks_is_said_once(
    tiny_llama: Path, protocol: Protocol, long_calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProtocolError, match="nowhere"):
        quantize(tiny_llama, tmp_path / "out", protocol(text(Path("nowhere"), STATIC)), device="cpu", workers=2)
    config = protocol(text(long_calibration, STATIC, more="  runner: layer_wise\n"))
    with pytest.raises(ProtocolError, match="layer_wise uses one device, and 2 are to share the run") as caught:
        quantize(tiny_llama, tmp_path / "out", config, device="cpu", workers=2)
    assert caught.value.diagnostics[0].hint == "say dp_layer_wise or auto"
    assert psutil.Process().children(recursive=True) == []


def command(model: Path, out: Path, config: Path) -> list[str]:
    paths = ["--model_path", str(model), "--save_path", str(out), "--config_path", str(config)]
    return ["quant", *paths, "--device", "cpu"]


def test_ranks_of_torchrun(
    tiny_llama: Path, protocol: Protocol, long_calibration: Path, tmp_path: Path, snapshot: Snapshot
) -> None:
    config = protocol(text(long_calibration, SMOOTH, STATIC))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(tiny_llama, tmp_path / "out", config)
    done = subprocess.run(
        [*torchrun, "-m", "modelslim", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("runner dp_layer_wise: 2 ranks") == 1
    quantize(tiny_llama, tmp_path / "alone", config, device="cpu")
    assert same(tmp_path / "out", tmp_path / "alone", snapshot)


@pytest.mark.parametrize(
    ("how", "often"),
    [(signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)],
    ids=["killed", "terminated", "terminal closed", "Ctrl-C", "Ctrl-C twice"],
)
def test_no_process_outlives_the_first_rank(
    how: signal.Signals, often: int, tiny_llama: Path, protocol: Protocol, long_calibration: Path, tmp_path: Path
) -> None:
    config = protocol(text(long_calibration, AUTOROUND.replace("iters: 2", "iters: 5000")))
    arguments = [sys.executable, "-m", "modelslim", *command(tiny_llama, tmp_path / "out", config), "--workers", "2"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.partial").is_dir():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        time.sleep(1.0)
        for _ in range(often):
            os.kill(process.pid, how)
            time.sleep(0.01)
        _, said = process.communicate(timeout=60)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert gone and not alive
    assert not (tmp_path / "out").exists()
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted" in said and "Traceback" not in said
