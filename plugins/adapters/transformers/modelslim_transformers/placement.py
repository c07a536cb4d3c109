# SPDX-License-Identifier: Apache-2.0
"""Lets a model whose parameters come and go say where it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def state_device(model: nn.Module, device: str) -> None:
    """Make ``device`` of the model and of its parts, which is that of some parameter, the device of the computation.

    Forwards ask for it to move their inputs there, and the parameter may be one of a unit that is on meta.

    Args:
        model: built by transformers.
        device: where the engine computes.
    """
    from transformers import PreTrainedModel

    def stated(_: Any) -> torch.device:
        return torch.device(device)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            own = type(module)
            # Transformers looks classes up by these names.
            names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
            module.__class__ = type(own.__name__, (own,), {**names, "device": property(stated)})
