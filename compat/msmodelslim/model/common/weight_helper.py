# SPDX-License-Identifier: Apache-2.0
"""Weights of a layer, by the name that some adapters import."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from msmodelslim.bridge.loading import active_loading


def get_state_dict(
    model_path: str | Path, module: nn.Module, prefix: str = "", exclude: list[str] | None = None
) -> dict[str, Tensor]:
    """What ``module.load_state_dict`` wants, without the names in ``exclude``."""
    state = active_loading().state_dict(module, prefix)
    return {name: tensor for name, tensor in state.items() if name not in (exclude or ())}
