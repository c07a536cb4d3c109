# SPDX-License-Identifier: Apache-2.0
"""The usual visit and forward of a decoder."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from torch import nn

from modelslim.api import ProcessRequest, drive
from msmodelslim.utils.exception import InvalidModelError


class TransformersForwardBreak(Exception):  # noqa: N818
    """Ends a forward whose first arguments are all that is wanted."""


def generated_decoder_layer_visit_func(
    model: nn.Module, transformer_blocks: Iterable[tuple[str, nn.Module]] | None = None
) -> Generator[ProcessRequest, Any, None]:
    """Yield decoder layers.

    Args:
        model: the model.
        transformer_blocks: names and layers; None for every module whose class is called ...DecoderLayer.

    Raises:
        InvalidModelError: there is none.
    """
    for name, block in _layers(model) if transformer_blocks is None else transformer_blocks:
        yield ProcessRequest(name, block)


def generated_decoder_layer_visit_func_with_keyword(
    model: nn.Module, keyword: str = "decoderlayer"
) -> Generator[ProcessRequest, Any, None]:
    """Yield every module whose class has the keyword in its name."""
    return generated_decoder_layer_visit_func(model, _layers(model, keyword))


def transformers_generated_forward_func(model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
    """The model's own forward, stopping at every decoder layer with the arguments that the model gives it.

    Args:
        model: the model.
        inputs: of one sample: a mapping, a list or tuple of positional ones, or the first one.
    """
    units = [ProcessRequest(name, block) for name, block in _layers(model)]
    if isinstance(inputs, dict):
        return drive(units, model, **{**inputs, "use_cache": False})
    args = inputs if isinstance(inputs, (list, tuple)) else (inputs,)
    return drive(units, model, *args, use_cache=False)


def _layers(model: nn.Module, keyword: str = "decoderlayer") -> list[tuple[str, nn.Module]]:
    layers = [(name, module) for name, module in model.named_modules() if keyword in type(module).__name__.lower()]
    if not layers:
        raise InvalidModelError(f"{type(model).__name__} has no module whose class has {keyword!r} in its name")
    return layers
