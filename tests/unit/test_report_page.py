# SPDX-License-Identifier: Apache-2.0
"""report.html as a document: what it shows, that it is whole, and that it reaches for nothing outside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from modelslim.cli.main import main
from modelslim.module_sizes import module_sizes
from modelslim.plots import heat_map, panel
from modelslim.report_page import render, size
from modelslim.run import quantize

WriteProtocol = Callable[[str], Path]
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Tags that open and close in order, attributes that lead elsewhere, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.classes += (values.get("class") or "").split()
        self.outside += [str(values[key]) for key in ("src", "href") if key in values and values[key] != "data:,"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def result(tiny_moe: Path, protocol: WriteProtocol, calibration_file: Path, tmp_path: Path) -> Path:
    """A quantized model with experts, smoothed."""
    text = f"""\
apiversion: modelslim_v1
spec:
  process:
    - type: flex_smooth_quant
    - type: linear_quant
      qconfig:
        act: {{scope: per_tensor, dtype: int8, symmetric: false, method: minmax}}
        weight: {{scope: per_channel, dtype: int8, symmetric: true, method: minmax}}
  save: [{{type: ascendv1_saver}}]
  dataset: {calibration_file}
"""
    quantize(tiny_moe, tmp_path / "out", protocol(text), device="cpu")
    return tmp_path / "out"


def test_the_page_shows_what_the_report_says_and_reaches_for_nothing(result: Path, capsys: Any) -> None:
    report = json.loads((result / "report.json").read_text())
    text = (result / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.outside == [] and "script" not in page.tags
    assert not re.search(r"https?://|url\(|@import", text)
    sections = ["size", "error", "kl", "worst", "activations", "experts", "time", "provenance"]
    assert [one for one in page.ids if one in sections] == sections
    worst = max((one["relative_error"], name) for unit in report["units"] for name, one in unit["quality"].items())
    table = page.text[page.text.index("Worst linears") :]
    assert table.index(worst[1]) < table.index(f"{worst[0]:.4f}")
    for row in report["modules"][:5]:
        assert row["module"] in page.text and f"{size(row['bytes_before'])} → {size(row['bytes_after'])}" in page.text
    for phase in ("plan", "units", "read", "calibrate and quantize", "write", "files and report", "verify"):
        assert phase in page.text
    origin = report["provenance"]
    assert origin["protocol"]["sha256"] in page.text and origin["dataset"]["samples_sha256"] in page.text
    assert origin["source"]["model.safetensors"]["sha256"] in page.text
    # Made anew it is the same page.
    (result / "report.html").unlink()
    assert main(["report", str(result)]) == 0
    assert (result / "report.html").read_text(encoding="utf-8") == text
    said = capsys.readouterr().out
    assert str(result / "report.html") in said
    last, value = list(report["kl"]["units"].items())[-1]
    assert f"{value:.3g} nats behind {last}" in said
    assert f"layers.1: KL so far {value:.3g} nats" in page.text


def test_a_report_that_says_little_or_comes_from_a_convert_has_a_page_as_well() -> None:
    report = {
        "report": 1,
        "model_path": "/models/<script>alert(1)</script>",
        "save_path": "out",
        "from": "ascendv1_saver",
        "to": "float",
        "schemes": {},
        "bytes_before": 10,
        "bytes_after": 0,
        "tensors": {"source": 1, "written": 0, "copied": 0},
        "peak_memory_bytes": None,
        "warnings": ["<b>bold</b>"],
    }
    text = render(report)
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "b" not in page.tags
    assert "<b>bold</b>" in page.text
    assert not {"error", "kl", "activations", "experts", "time"} & set(page.ids)
    report["kl"] = {"texts": 0, "tokens": 0, "positions": 0, "units": {}, "notes": ["nothing was calibrated"]}
    assert "Not shown: nothing was calibrated." in Page(render(report)).text


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"report": 2}'])
def test_what_is_no_report_is_refused(content: str | None, tmp_path: Path, capsys: Any) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "PATH is the folder that quant or convert wrote" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_sizes_are_those_of_the_modules_that_the_source_has() -> None:
    before = {"embed.weight": 8, "layers.0.mlp.experts.gate_up_proj": 64, "layers.1.mlp.experts.gate_up_proj": 64}
    after = {
        "embed.weight": 8,
        "layers.0.mlp.experts.0.gate_proj.weight": 16,
        "layers.0.mlp.experts.1.up_proj.weight": 16,
        "layers.1.mlp.experts.0.gate_proj.weight": 20,
    }
    assert module_sizes(before, after, [("layers.0.mlp.experts.0.gate_proj", "W8A8")]) == [
        {"module": "layers.*.mlp.experts", "schemes": {"W8A8": 1}, "bytes_before": 128, "bytes_after": 52},
        {"module": "embed", "schemes": {}, "bytes_before": 8, "bytes_after": 8},
    ]


def test_a_panel_has_places_in_percent_and_gaps() -> None:
    one = panel("error", ["a", "b", "c"], [("x", [0.01, None, 1.0])])
    assert one is not None
    ((x0, y0, said), (x1, y1, _)) = one.series[0].points
    assert (x0, x1, said) == (0, 100, "a: x 0.01")
    assert 100 > y0 > 90 and 10 > y1 > 0  # large is above
    assert one.series[0].lines == []  # nothing joins points across a gap
    assert [text for _, text in one.ticks] == ["0.01", "0.03", "0.1", "0.3", "1"]
    assert panel("error", ["a"], [("x", [None])]) is None
    flat = panel("seconds", ["a"], [("x", [0.0])], log=False, unit=" s")
    assert flat is not None and flat.series[0].points == [(50, 100, "a: x 0 s")]


def test_a_heat_map_shades_each_layer_by_its_own_mean() -> None:
    found = heat_map([[0, 100, 100, 200], [1, 1, 1, 1]])
    assert (found.columns, found.rows) == (4, 2)
    assert found.shades[0] == "M0 0h1v1h-1z"  # no token
    assert found.shades[4] == "M1 0h2v1h-2zM0 1h4v1h-4z"  # the mean and up to twice of it
    assert found.shades[5] == "M3 0h1v1h-1z"
