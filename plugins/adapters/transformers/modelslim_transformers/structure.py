# SPDX-License-Identifier: Apache-2.0
"""Where a model's units are: its language layers, and the towers that feed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from modelslim.api import ModelError


def language_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of the layers of the language model: its list of modules that holds the most parameters.

    Raises:
        ModelError: there is no list.
    """
    # A vision tower may be larger than a small language model, so it must not take part.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    lists = list(_outermost_lists(decoder, prefix))
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers", hint="write an adapter that names the model's units"
        )
    if len(lists) == 1:  # as in most models, where counting would be repeated for every sample
        return lists[0]
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules beside the language layers that hold layers of their own: vision and audio towers, in their order.

    A connector that holds a few linears and no list of layers is not among them: models call it between
    two passes of one tower (an image and a video), where it cannot be a unit.
    """
    layers, _ = language_layers(model)
    parent: nn.Module = model
    prefix = ""
    for part in layers.split("."):
        for name, child in parent.named_children():
            if name != part and not isinstance(child, nn.ModuleList) and any(_outermost_lists(child)):
                yield f"{prefix}{name}", child
        parent = parent.get_submodule(part)
        prefix += f"{part}."


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules by their paths, those inside another list left out."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")
