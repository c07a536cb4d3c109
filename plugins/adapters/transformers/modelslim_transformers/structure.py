# SPDX-License-Identifier: Apache-2.0
"""Where a model's units are: its language layers, and the towers that feed them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
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
    lists = list(outermost_lists(decoder, prefix))
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers", hint="write an adapter that names the model's units"
        )
    if len(lists) == 1:  # as in most models, where counting would be repeated for every sample
        return lists[0]
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def towers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules beside the language layers that hold layers of their own (vision, audio), in the order of their calls.

    A connector that holds a few linears and no list of layers is not among them: models call it between
    two passes of one tower (an image and a video), where it cannot be a unit.
    """
    layers, _ = language_layers(model)
    parent: nn.Module = model
    prefix = ""
    for part in layers.split("."):
        found = {
            name: child
            for name, child in parent.named_children()
            if name != part and not isinstance(child, nn.ModuleList) and any(outermost_lists(child))
        }
        for name in _in_order_of_calls(found, type(parent)) if len(found) > 1 else found:
            yield f"{prefix}{name}", found[name]
        parent = parent.get_submodule(part)
        prefix += f"{part}."


def _in_order_of_calls(names: Iterable[str], kind: type) -> list[str]:
    """Names of parts in the order in which the class's forward comes to them; those that it never names at the end."""
    positions: dict[str, int] = {}
    for name in _named_by(kind, "forward", set()):
        positions.setdefault(name, len(positions))
    return sorted(names, key=lambda name: positions.get(name, len(positions)))


def _named_by(kind: type, method: str, seen: set[str]) -> Iterator[str]:
    """Attributes that a method names, in the order of its code; methods that get features are followed."""
    seen.add(method)
    code = getattr(inspect.unwrap(getattr(kind, method)), "__code__", None)
    for name in code.co_names if code else ():
        if name.startswith("get_") and name not in seen and callable(getattr(kind, name, None)):
            yield from _named_by(kind, name, seen)
        yield name


def outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules by their paths, those inside another list left out."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield f"{prefix}{name}", child
        else:
            yield from outermost_lists(child, f"{prefix}{name}.")
