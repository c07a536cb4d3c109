# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, with and without experts, and Qwen2.5-VL: one vision tower, mergers included, in front of a decoder."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from modelslim_transformers.adapter import TransformersAdapter

TOWER = "model.visual"
"""Patch embedding, blocks, merger and DeepStack mergers: looks at images and, in a second call, at videos."""
LAYERS = "model.language_model.layers"


class Qwen3VLAdapter(TransformersAdapter):
    """Serves the models that transformers builds as qwen3_vl, qwen3_vl_moe and qwen2_5_vl.

    Fusion of the visual features, DeepStack and the three-dimensional positions come from the model's own
    forward; the processor of the checkpoint writes a placeholder per merged patch.
    """

    def towers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The vision tower as a whole."""
        yield TOWER, model.get_submodule(TOWER)

    def language_layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """The decoder's layers, between which the model adds the DeepStack features."""
        layers = model.get_submodule(LAYERS)
        assert isinstance(layers, nn.ModuleList)
        return LAYERS, layers
