# SPDX-License-Identifier: Apache-2.0
"""Both classes keep ModelSlim's contract, against the model as transformers itself loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from modelslim_qwen3_vl_moe_short.adapter import Qwen3VLMoeBlocks, Qwen3VLMoeShort
from torch import nn

from modelslim.api import VlmCalibSample
from modelslim.testing.adapter import AdapterContract

CHECKPOINT = Path(__file__).parents[3] / "tests" / "models" / "qwen3-vl-moe-tiny"


class TestQwen3VLMoeShort(AdapterContract):
    kind = Qwen3VLMoeShort

    @pytest.fixture
    def checkpoint(self) -> Path:
        return CHECKPOINT

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        return self.kind("qwen3_vl_moe", checkpoint)

    @pytest.fixture
    def samples(self, tmp_path: Path) -> Sequence[Any]:
        from PIL import Image

        Image.linear_gradient("L").convert("RGB").resize((160, 96)).save(tmp_path / "wide.png")
        return [VlmCalibSample("Text alone."), VlmCalibSample("Describe the image.", str(tmp_path / "wide.png"))]

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(checkpoint)(**inputs, use_cache=False).logits


class TestQwen3VLMoeBlocks(TestQwen3VLMoeShort):
    kind = Qwen3VLMoeBlocks
