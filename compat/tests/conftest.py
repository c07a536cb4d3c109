# SPDX-License-Identifier: Apache-2.0
"""Adapters written for the existing tool, installed as a third party would, and models for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OLD = Path(__file__).parent / "old"
VL_MODEL = Path(__file__).parents[2] / "tests" / "models" / "qwen3-vl-moe-tiny"

METADATA = "Metadata-Version: 2.1\nName: old-adapters\nVersion: 1.0\n"
ENTRY_POINTS = """\
[modelslim.models]
Old-VL = old_qwen3_vl_moe.model_adapter:Qwen3VLMoeModelAdapter
Old-Text = old_text:OldText
"""


@pytest.fixture(scope="session", autouse=True)
def old_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The packages in ``old`` with entry points, as pip would have left them behind."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "old_adapters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    added = [str(OLD), str(folder)]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


@pytest.fixture(scope="session")
def vl_model() -> Path:
    """A trained Qwen3-VL-MoE of four layers, its experts stored as [experts, in, out], as published."""
    return VL_MODEL


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two drawn pictures of different sizes."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(96, 96), (64, 128)]):
        picture = Image.new("RGB", size, (200, 30 * number, 90))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((8, 8 + 10 * number, 56, 60), fill=(10, 200, 40))
        draw.rectangle((30, 40, 60, 62), fill=(20, 20, 220 - 50 * number))
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``text_model("qwen3_moe", **config)`` -> a random checkpoint in bf16, with the tokenizer of the other model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    common: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "dtype": "bfloat16",
    }

    def make(model_type: str, **settings: Any) -> Path:
        path = tmp_path_factory.mktemp(model_type)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}))
            for name, parameter in model.named_parameters():
                if "norm" in name:  # fresh norms are all ones, which would hide a mix-up
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            model.to(torch.bfloat16).save_pretrained(path)
        AutoTokenizer.from_pretrained(VL_MODEL).save_pretrained(path)
        return path

    return make
