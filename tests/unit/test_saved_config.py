# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint as an adapter opens it: the same files, and a config.json without quantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelslim.checkpoint import Checkpoint
from modelslim.saved_config import opened_as_float, without_quantization

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "quantization_config": {"quant_method": "compressed-tensors"},
    "text_config": {"quantization_config": {}, "hidden_size": 4},
    "thinker_config": {"text_config": {"quantization_config": {}, "layers": 2}},
    "vision_config": None,
    "rope_scaling": {"quantization_config": "not a config of a part"},
}
PLAIN = {
    "model_type": "llama",
    "text_config": {"hidden_size": 4},
    "thinker_config": {"text_config": {"layers": 2}},
    "vision_config": None,
    "rope_scaling": {"quantization_config": "not a config of a part"},
}


def test_quantization_config_goes_at_every_depth() -> None:
    assert without_quantization(CONFIG) == PLAIN
    assert "quantization_config" in CONFIG, "the argument is left alone"


@pytest.fixture
def stored(tmp_path: Path, tiny_llama: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    for file in tiny_llama.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_directory_holds_the_same_files_and_another_config(stored: Path) -> None:
    (stored / "code").mkdir()
    (stored / "code" / "own.py").write_text("")
    (stored / "config.json").write_text(json.dumps(CONFIG))
    with Checkpoint(stored) as checkpoint, opened_as_float(checkpoint) as directory:
        assert {file.name for file in directory.iterdir()} == {file.name for file in stored.iterdir()}
        assert json.loads((directory / "config.json").read_text()) == PLAIN
        assert (directory / "code" / "own.py").is_file()
        with Checkpoint(directory) as opened:
            assert opened.shapes == checkpoint.shapes
    assert not directory.exists()
    assert json.loads((stored / "config.json").read_text()) == CONFIG
    assert (stored / "model.safetensors").is_file()


def test_checkpoint_without_quantization_is_opened_where_it_is(stored: Path) -> None:
    with Checkpoint(stored) as checkpoint, opened_as_float(checkpoint) as directory:
        assert directory == stored
    assert stored.is_dir()
