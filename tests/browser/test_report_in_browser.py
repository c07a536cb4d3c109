# SPDX-License-Identifier: Apache-2.0
"""report.html in a real browser, wide and narrow, light and dark: nothing fails, overflows or becomes too small."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from modelslim.report_page import write_page
from modelslim.run import quantize

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `tox -e tests` has it")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# All text: its size, its place, and its contrast (WCAG) with the nearest background around it.
LOOK = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = color => { const [r, g, b] = rgb(color).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, holder = node.parentElement;
    if (!node.data.trim() || holder.closest('title')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), style = getComputedStyle(holder);
    if (!box.width) continue;
    let around = holder;
    const clear = element => rgb(getComputedStyle(element).backgroundColor)[3] === 0;
    while (around.parentElement && clear(around)) around = around.parentElement;
    const [a, b] = [light(style.color), light(getComputedStyle(around).backgroundColor)];
    found.push({text: node.data.trim().slice(0, 40), size: parseFloat(style.fontSize), left: box.left, right: box.right,
      contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)});
  }
  return found;
}"""
TICKS = """() => [...document.querySelectorAll('.axis')].map(axis => [...axis.children]
  .map(tick => tick.getBoundingClientRect()).map(box => [box.top, box.bottom]).sort((a, b) => a[0] - b[0]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with api.sync_playwright() as player:
        running = player.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tiny_moe: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a model with experts, smoothed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "protocol.yaml").write_text(f"""\
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
""")
    return quantize(tiny_moe, folder / "out", folder / "protocol.yaml", device="cpu")


def grown(report: dict[str, Any]) -> dict[str, Any]:
    """The same with 60 layers of 64 experts, long names and paths, fall backs, warnings and notes."""
    big: dict[str, Any] = json.loads(json.dumps(report))
    text = json.dumps(big["units"][1])
    big["units"] = [json.loads(text.replace("model.layers.1", f"model.language_model.layers.{n}")) for n in range(60)]
    for number, unit in enumerate(big["units"]):
        for quality in unit["quality"].values():
            quality["relative_error"] *= 1 + number % 7
        for seen in unit["experts"].values():
            seen["tokens"] = [(expert * 37 + number * 11) % 97 * (expert % 9 > 0) for expert in range(64)]
        name = next(iter(unit["linears"]))
        unit["fell_back"] = {name: {"from": "W4A8_DYNAMIC", "to": "FLOAT", "relative_error": 0.31}}
        unit["notes"] = {name: ["the Hessian was damped with 0.1, ten times what the protocol says"]}
    big["kl"]["units"] = {unit["unit"]: 0.001 * 1.1**number for number, unit in enumerate(big["units"])}
    big["kl"]["notes"] = ["1 units, such as model.visual, give nothing that the model's end could read"]
    big["model_path"] = "/mnt/models/" + "a_long_folder_without_any_hyphen/" * 5 + "Qwen3-VL-235B-A22B-Instruct"
    big["warnings"] = [
        f"{number}: " + "model.language_model.layers.0.mlp.experts.gate_up_proj" * 4 for number in range(9)
    ]
    big["provenance"]["command"] = ["modelslim", "quant", "--model_path", big["model_path"], "--save_path", "x" * 200]
    return big


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_the_page_is_readable(
    kind: str, width: int, scheme: str, report: dict[str, Any], browser: Any, tmp_path: Path
) -> None:
    file = write_page(report if kind == "small" else grown(report), tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    shot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"report-{kind}-{width}-{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert (said, asked) == ([], [file.as_uri()])
    assert page.evaluate("document.documentElement.scrollWidth") == width
    texts = page.evaluate(LOOK)
    assert len(texts) > 100
    assert [one for one in texts if one["size"] < 12] == []
    assert [one for one in texts if one["left"] < 0 or one["right"] > width] == []
    assert [one for one in texts if one["contrast"] < 4.5] == []
    axes = page.evaluate(TICKS)
    assert axes and all(upper[1] <= lower[0] for ticks in axes for upper, lower in pairwise(ticks))
    assert page.locator("circle").count() > 20
    assert page.locator("#kl circle").count() == (2 if kind == "small" else 60)
    heat = page.locator(".heat svg").bounding_box()
    assert heat["width"] > width / 2 and heat["height"] >= 48
    page.close()
