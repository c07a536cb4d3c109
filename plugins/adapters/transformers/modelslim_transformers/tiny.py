# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of an architecture: its config.json with every kind of layer and all sizes small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelslim.api import CapabilityError
from modelslim_transformers.tiny_config import listed_by_layer, shrink
from modelslim_transformers.tiny_inputs import make_inputs

MOST_PARAMETERS = 50_000_000
"""More means that a size was not recognized."""


def write_tiny_checkpoint(
    source: Path, config: Any, layers: Sequence[nn.Module] | nn.ModuleList, build: Callable[[Path], Any], path: Path
) -> list[dict[str, Any]]:
    """Write the checkpoint and make inputs for it.

    Args:
        source: directory of the real checkpoint, for the code that it may bring.
        config: its configuration.
        layers: the language layers of the real model, on meta.
        build: builds the model that a directory's config.json describes, without weights.
        path: the empty directory that gets the checkpoint.

    Returns:
        Inputs of the model, of different lengths.

    Raises:
        CapabilityError: the architecture has sizes that are not known here, or inputs of another kind.
    """
    values = shrink(config.to_dict(), count_layers(layers, config.get_text_config()))
    tiny = type(config)(**values)
    tiny.architectures = config.architectures
    if getattr(config, "auto_map", None):
        # Code stays where it is: transformers keeps a copy for every directory that it loads code from.
        places = {key: name for key, name in config.auto_map.items() if isinstance(name, str)}
        tiny.auto_map = {key: name if "--" in name else f"{source}--{name}" for key, name in places.items()}
    tiny.save_pretrained(path)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(path).parameters())
    if parameters > MOST_PARAMETERS:
        raise CapabilityError(f"a tiny model of its architecture has still {parameters:,} parameters")
    model = build(path)
    fill_raw_parameters(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            # Fresh norms are ones and fresh biases zeros, which would hide a mistake.
            tensor += (torch.randn(tensor.shape) * 0.1).to(tensor.dtype)
    with _no_progress_bar():
        model.save_pretrained(path)
    return make_inputs(model)


def fill_raw_parameters(model: nn.Module) -> None:
    """Give numbers to the matrices that a model makes itself, such as stacked experts, and leaves to its checkpoint.

    They hold what lay in memory before, which may be NaN.
    """
    for module in model.modules():
        if not hasattr(module, "reset_parameters"):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not parameter.is_meta:
                    nn.init.normal_(parameter, std=0.1)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing how it writes a tiny file."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def count_layers(layers: Sequence[nn.Module] | nn.ModuleList, config: Any) -> int:
    """How many of the first layers hold one of every kind; at least two."""
    listed = listed_by_layer(config.to_dict(), len(layers)).values()
    # Numbers that all differ are indices, not kinds.
    by_layer = [value for value in listed if isinstance(value[0], str) or len(set(map(str, value))) < len(value)]
    kinds: set[Any] = set()
    last = 1
    for index, layer in enumerate(layers):
        kind = (*(str(value[index]) for value in by_layer), *structure(layer))
        if kind not in kinds:
            kinds.add(kind)
            last = max(last, index)
    return min(last + 1, len(layers))


def structure(layer: nn.Module) -> tuple[Any, ...]:
    """The classes of a layer's modules and their switches: what is on, off, named, or there at all."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        switches = [
            (key, value if isinstance(value, (bool, str, type(None))) else "a number")
            for key, value in vars(module).items()
            if not key.startswith("_") and isinstance(value, (bool, str, int, float, type(None)))
        ]
        found.append((name, type(module).__name__, *switches))
    return tuple(found)
