# SPDX-License-Identifier: Apache-2.0
"""Writes a family's tiny checkpoint with the code of the adapters' own tests, and the data that calibrates it."""

from __future__ import annotations

import importlib.util
import json
import math
import wave
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from families import COMMON, FAMILIES, SIZES

ROOT = Path(__file__).parents[2]
TEXTS = ("seven boats 7 and eleven more in the harbour", "a scale maps a range of numbers", "twelve chars", "x1 y2 z3")
SHAPES = ((20, 24, 3), (40, 16, 3))


def write_family(name: str, path: Path) -> None:
    """A float checkpoint in bfloat16, with all files that its publisher puts beside the weights."""
    family = FAMILIES[name]
    _WRITERS[family.plugin](_fixtures(family.plugin), name, family.settings, path)


def write_samples(path: Path) -> None:
    """Calibration data: ``texts.jsonl``, and the directories ``images`` and ``sounds``."""
    from PIL import Image

    path.mkdir()
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    generator = torch.Generator().manual_seed(2)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy() for shape in SHAPES]
    seen = [{"image": f"{index}.png", "text": TEXTS[index]} for index in range(len(images))]
    heard = [{"image": "0.png", "audio": "a.wav", "text": TEXTS[2]}, {"audio": "a.wav", "text": TEXTS[3]}]
    for folder, records in (("images", seen), ("sounds", heard)):
        (path / folder).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(path / folder / f"{index}.png")
        # The text alone goes first: a unit that it passes by must not be taken for one without data.
        text = json.dumps([{"text": TEXTS[0]}, *records])
        (path / folder / "index.json").write_text(text, encoding="utf-8")
    with wave.open(str(path / "sounds" / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(array("h", (round(9000 * math.sin(0.17 * time)) for time in range(5000))).tobytes())


def _fixtures(plugin: str) -> Any:
    """A copy of the conftest of an adapter, whose functions write checkpoints, tokenizers and processors."""
    file = ROOT / "plugins" / "adapters" / plugin / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"fixtures_of_{plugin}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_generic(fixtures: Any, name: str, settings: Mapping[str, Any], path: Path) -> None:
    sees = "vision_config" in settings
    whole = _merge({"text_config": COMMON}, settings) if sees else {**COMMON, **settings}
    fixtures.write_checkpoint(path, name, whole, torch.bfloat16, "1GB")
    if sees:
        fixtures.save_tokenizer(path, fixtures.PLACEHOLDERS, fixtures.ALIASES)
        fixtures.write_processor(path, name)
    else:
        fixtures.save_tokenizer(path)


def _write_deepseek(fixtures: Any, name: str, settings: Mapping[str, Any], path: Path) -> None:
    fixtures.COMMON = {**fixtures.COMMON, **SIZES, **settings}
    fixtures.SETTINGS = {name: {}}
    fixtures.write_float(path, name, mtp_layers=1)
    _fixtures("transformers").save_tokenizer(path)


def _write_glm(fixtures: Any, name: str, settings: Mapping[str, Any], path: Path) -> None:
    fixtures.COMMON = {**fixtures.COMMON, **SIZES}
    fixtures.SETTINGS = {name: _merge(fixtures.SETTINGS[name], settings)}
    fixtures.write_checkpoint(path, name, mtp_layers=1)
    fixtures.write_processor(path, name)


def _write_omni(fixtures: Any, name: str, settings: Mapping[str, Any], path: Path) -> None:
    thinker_config = fixtures.thinker_config
    fixtures.thinker_config = lambda model_type: _merge(thinker_config(model_type), settings)
    fixtures.write_checkpoint(path, name)


_WRITERS: Mapping[str, Callable[[Any, str, Mapping[str, Any], Path], None]] = {
    "transformers": _write_generic,
    "deepseek": _write_deepseek,
    "glm": _write_glm,
    "qwen-omni": _write_omni,
}


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second winning, at every depth."""
    merged = dict(first)
    for key, value in second.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
