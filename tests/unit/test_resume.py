# SPDX-License-Identifier: Apache-2.0
"""A run that was interrupted goes on where it was, to the same bytes, or says why it does not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelslim import report
from modelslim.api import hookimpl
from modelslim.errors import SaveError, UsageError
from modelslim.journal import JOURNAL
from modelslim.media import content
from modelslim.run import quantize
from modelslim.runners import finished
from modelslim.runners.finished import FinishedUnits
from modelslim.runners.work import UnitWork
from modelslim.vlm_dataset import VlmCalibSample

QUANT = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
DYNAMIC = "{type: linear_quant, qconfig: {act: {scope: per_token}, weight: {dtype: int8}}}"
HISTOGRAM = QUANT.replace("per_tensor", "per_tensor, method: histogram")
GPTQ = QUANT.replace("int8}}}", "int8, method: gptq}}}")
INT4 = (
    "{type: linear_quant, qconfig: {act: {dtype: float}, "
    "weight: {dtype: int4, scope: per_group, method: gptq, ext: {group_size: 32}}}}"
)
SMOOTH = "{type: iter_smooth, alpha: 0.5}"
FLEX = "{type: flex_smooth_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}}"
CACHE = "{type: dynamic_cache, qconfig: {dtype: int8, scope: per_channel}}"
AUTOROUND = "{type: autoround_quant, iters: 2, strategies: [{qconfig: {act: {dtype: float}, weight: {dtype: int8}}}]}"
HEAD = "{type: linear_quant, qconfig: {act: {scope: per_tensor}, weight: {dtype: int8}}, include: ['*', lm_head]}"
PRUNE = "{type: float_sparse}"
LOWBIT = "{type: lowbit_sparse}"
SHARDED = "{type: ascendv1_saver, part_file_size: 0.00006}"

Protocol = Callable[[str], Path]


class Snapshots:
    """Copies what lies on the disk after each tensor, as a process killed there would leave it."""

    def __init__(self, partial: Path, folder: Path) -> None:
        self._partial = partial
        self._folder = folder
        self.taken: list[Path] = []

    @hookimpl
    def tensor_written(self) -> None:
        target = self._folder / str(len(self.taken))
        shutil.copytree(self._partial, target)
        self.taken.append(target)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("report.html", "report.json")
    }


def without_measurements(report: dict[str, Any]) -> Any:
    report = json.loads(json.dumps(report))
    del report["save_path"], report["peak_memory_bytes"], report["phases"], report["provenance"]["finished"]
    del report["memory"]["peak_bytes"], report["memory"]["estimated_seconds"]
    for unit in report["units"]:
        del unit["peak_memory_bytes"]
        assert unit.pop("seconds").keys() >= {"read", "write"}
    return report


def text(*entries: str, save: str = SHARDED, more: str = "") -> str:
    process = "".join(f"    - {entry}\n" for entry in entries)
    return f"apiversion: modelslim_v1\nspec:\n  process:\n{process}  save: [{save}]\n{more}"


def run(model: Path, out: Path, config: Path, *observers: Any, restart: bool = False) -> dict[str, Any]:
    named = [(f"observer{number}", observer) for number, observer in enumerate(observers)]
    return quantize(model, out, config, device="cpu", restart=restart, observers=named)


@pytest.mark.parametrize(
    ("entries", "more", "save", "standing"),
    [
        ([DYNAMIC], "", SHARDED, False),
        ([QUANT], "", SHARDED, False),
        ([QUANT], "", "{type: ascendv1_saver, part_file_size: 0}", False),
        ([HEAD], "", SHARDED, False),
        ([SMOOTH, QUANT], "", SHARDED, False),
        ([SMOOTH, HISTOGRAM], "", SHARDED, False),
        ([SMOOTH, QUANT], "  propagation: quantized\n", SHARDED, True),
        ([FLEX, QUANT, CACHE], "  propagation: quantized\n", SHARDED, True),
        ([GPTQ], "", SHARDED, True),
        ([INT4], "", "{type: gptq_saver}", True),
        ([INT4], "", "{type: compressed_tensors_saver}", True),
        ([PRUNE], "", SHARDED, True),
        ([SMOOTH, LOWBIT], "", SHARDED, True),
        ([AUTOROUND], "", SHARDED, True),
        ([AUTOROUND], "  propagation: float\n", SHARDED, False),
    ],
    ids=[
        "data-free",
        "static",
        "one file",
        "lm_head",
        "smooth",
        "smooth in two passes",
        "smooth, propagated",
        "cache, propagated",
        "gptq",
        "gptq in groups",
        "gptq, compressed-tensors",
        "sparse float",
        "smooth, sparse int8",
        "autoround, propagated",
        "autoround",
    ],
)
def test_a_run_continues_to_the_same_bytes_wherever_it_was_killed(
    entries: list[str],
    more: str,
    save: str,
    standing: bool,
    tiny_llama: Path,
    protocol: Protocol,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_continuing(tiny_llama, entries, more, save, standing, protocol, calibration_file, tmp_path, monkeypatch)


def test_units_of_fused_experts_are_passed_again_too(
    tiny_moe: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_continuing(tiny_moe, [GPTQ], "", SHARDED, True, protocol, calibration_file, tmp_path, monkeypatch)


def check_continuing(
    model: Path,
    entries: list[str],
    more: str,
    save: str,
    standing: bool,
    protocol: Protocol,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quantize, then continue from what lay on the disk after every few tensors."""
    config = protocol(text(*entries, save=save, more=f"  dataset: {calibration_file}\n{more}"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    snapshots = Snapshots(tmp_path / "whole.partial", tmp_path)
    expected_report = run(model, whole, config, snapshots)
    assert bool(expected_report["kl"]["units"]) == bool(expected_report["samples"])
    expected = digests(whole)
    used: list[bool] = []
    find = FinishedUnits.standing

    def watched(self: FinishedUnits, index: int) -> Any:
        found = find(self, index)
        used.append(found is not None)
        return found

    monkeypatch.setattr(finished.FinishedUnits, "standing", watched)
    for snapshot in snapshots.taken[:: max(1, len(snapshots.taken) // 8)]:
        snapshot.rename(tmp_path / "out.partial")
        again = run(model, out, config)
        assert digests(out) == expected, snapshot.name
        assert without_measurements(again) == without_measurements(expected_report)
        shutil.rmtree(out)
    assert all(used) and bool(used) == standing


def partial(model: Path, out: Path, config: Path, tmp_path: Path, moment: int = 40) -> None:
    """Leave what a run would that was killed after some tensors."""
    snapshots = Snapshots(tmp_path / "other.partial", tmp_path)
    run(model, tmp_path / "other", config, snapshots)
    shutil.rmtree(tmp_path / "other")
    snapshots.taken[moment].rename(out.with_name(f"{out.name}.partial"))


class Units:
    """Notes which units are calibrated, and not only passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calibrated: list[str] = []
        calibrate = UnitWork.calibrate

        def watched(work: UnitWork, *args: Any, **kwargs: Any) -> Any:
            self.calibrated.append(work._unit)
            return calibrate(work, *args, **kwargs)

        monkeypatch.setattr(UnitWork, "calibrate", watched)


def test_units_that_are_done_are_not_calibrated_again(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = protocol(text(GPTQ, more=f"  dataset: {calibration_file}\n"))
    partial(tiny_llama, tmp_path / "out", config, tmp_path)
    lines = (tmp_path / "out.partial" / JOURNAL).read_text().splitlines()
    done = [json.loads(line)["unit"] for line in lines[1:]]
    units = Units(monkeypatch)
    run(tiny_llama, tmp_path / "out", config)
    names = [f"model.layers.{number}" for number in range(3)]
    assert done == names[: len(done)] != []
    assert units.calibrated == names[len(done) :] != []


def test_restart_begins_anew(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = protocol(text(GPTQ, more=f"  dataset: {calibration_file}\n"))
    partial(tiny_llama, tmp_path / "out", config, tmp_path)
    units = Units(monkeypatch)
    run(tiny_llama, tmp_path / "out", config, restart=True)
    assert len(units.calibrated) == 3


def test_what_has_changed_is_named_and_refused(
    tiny_llama: Path, protocol: Protocol, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    shutil.copyfile(calibration_file, data)
    config = protocol(text(QUANT, more=f"  dataset: {data}\n"))
    partial(model, out, config, tmp_path)
    before = digests(tmp_path / "out.partial")

    def refused() -> list[str]:
        with pytest.raises(UsageError, match="the rest of a run that was not the same") as error:
            run(model, out, config)
        assert "--restart" in error.value.hint
        assert digests(tmp_path / "out.partial") == before
        return [str(one) for one in error.value.diagnostics]

    def changes(file: Path, content: str) -> list[str]:
        kept, stat = file.read_text(encoding="utf-8"), file.stat()
        file.write_text(content, encoding="utf-8")
        found = refused()
        file.write_text(kept, encoding="utf-8")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return found

    original = config.read_text(encoding="utf-8")
    assert changes(config, original.replace("per_tensor", "per_tensor, method: histogram")) == [
        "the protocol has changed"
    ]
    assert changes(data, data.read_text(encoding="utf-8").replace("river", "brook")) == [
        "the calibration data have changed"
    ]
    tokens = model / "tokenizer_config.json"
    assert changes(tokens, tokens.read_text(encoding="utf-8") + " ") == ["the source model has changed"]
    stat = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert refused() == ["the source model has changed"]
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with monkeypatch.context() as patch:
        known = report.versions
        patch.setattr(report, "versions", lambda plan: {**known(plan), "modelslim-algorithm-linear-quant": "9"})
        patch.setattr(report, "describe_computer", lambda device: {"threads": "77"})
        found = refused()
        assert "versions: modelslim-algorithm-linear-quant was 0.1.0 and is 9" in found
        assert any("the computer: threads was" in one for one in found)
        patch.setattr(report, "content", str.upper)
        assert "the calibration data have changed" in refused()
    run(model, out, config)


def test_the_content_of_media_files_counts_and_not_their_place(tmp_path: Path) -> None:
    def sample(folder: str, data: bytes) -> VlmCalibSample:
        file = tmp_path / folder / "a.png"
        file.parent.mkdir()
        file.write_bytes(data)
        return VlmCalibSample("text", image=str(file))

    one, same, other = sample("a", b"1"), sample("b", b"1"), sample("c", b"2")
    assert content(one) == content(same) != content(other)
    assert content(one) != content(VlmCalibSample("text"))
    assert content("text") == "text"


def test_a_line_that_was_cut_in_half_counts_for_nothing(tiny_llama: Path, protocol: Protocol, tmp_path: Path) -> None:
    config = protocol(text(DYNAMIC))
    run(tiny_llama, tmp_path / "whole", config)
    partial(tiny_llama, tmp_path / "out", config, tmp_path)
    journal = tmp_path / "out.partial" / JOURNAL
    for keep in range(journal.stat().st_size, 0, -journal.stat().st_size // 6):
        shutil.copytree(tmp_path / "out.partial", tmp_path / "cut.partial")
        os.truncate(tmp_path / "cut.partial" / JOURNAL, keep)
        run(tiny_llama, tmp_path / "cut", config)
        assert digests(tmp_path / "cut") == digests(tmp_path / "whole"), keep
        shutil.rmtree(tmp_path / "cut")


def test_a_rest_that_somebody_has_changed_is_refused(tiny_llama: Path, protocol: Protocol, tmp_path: Path) -> None:
    config = protocol(text(DYNAMIC))
    partial(tiny_llama, tmp_path / "out", config, tmp_path)
    for file in sorted((tmp_path / "out.partial").glob("*.unfinished")):
        shutil.copytree(tmp_path / "out.partial", tmp_path / "cut.partial")
        (tmp_path / "cut.partial" / file.name).unlink()
        with pytest.raises(SaveError, match="is not all there"):
            run(tiny_llama, tmp_path / "cut", config)
        shutil.rmtree(tmp_path / "cut.partial")
