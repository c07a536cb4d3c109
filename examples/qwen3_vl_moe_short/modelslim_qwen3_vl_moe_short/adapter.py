# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL-MoE upon the generic adapter: which modules are units, and how a sample becomes a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from modelslim.api import VlmCalibSample
from modelslim_transformers.adapter import TransformersAdapter

TOWER = "model.visual"
LAYERS = "model.language_model.layers"


class Qwen3VLMoeShort(TransformersAdapter):
    """Says what the generic adapter would otherwise derive; weights, forward and experts are its."""

    def towers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """One unit for the whole vision part, mergers included."""
        yield TOWER, model.get_submodule(TOWER)

    def language_layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """The list whose members become one unit each."""
        layers = model.get_submodule(LAYERS)
        assert isinstance(layers, nn.ModuleList)
        return LAYERS, layers

    def messages(self, sample: VlmCalibSample) -> list[dict[str, Any]]:
        """The image first, then the prompt, as the model's publisher shows it."""
        content = [{"type": "text", "text": sample.text}]
        if sample.image is not None:
            content.insert(0, {"type": "image", "image": sample.image})
        return [{"role": "user", "content": content}]


class Qwen3VLMoeBlocks(Qwen3VLMoeShort):
    """The same with the vision part block by block, for one that is too large to be held whole."""

    def towers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """One unit for each vision block; what lies around them is outside the units."""
        for index, block in enumerate(model.get_submodule(f"{TOWER}.blocks").children()):
            yield f"{TOWER}.blocks.{index}", block
