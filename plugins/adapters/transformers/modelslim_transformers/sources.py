# SPDX-License-Identifier: Apache-2.0
"""Which stored tensors make which parameters, by the rules with which transformers itself loads a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from modelslim.api import WeightSource


def weight_sources(model: nn.Module, keys: Sequence[str]) -> Mapping[str, WeightSource]:
    """Group stored names by the parameter that transformers makes of them.

    Renames are followed; parameters that are put together from several stored tensors (fused
    experts) get a ``convert``. Stored tensors that the model does not know are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    state = dict(model.state_dict())

    def rename(key: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if renamed not in state and key in state:
            # The rule was meant for another layout of the same family.
            renamed, pattern = rename_source_key(key, [], [], prefix, state)
        return renamed, pattern

    parts: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename(key)
        if target in state:
            parts.setdefault(target, []).append((key, pattern))

    sources: dict[str, WeightSource] = {}
    for target, stored in parts.items():
        pattern = stored[0][1]
        if pattern is None:
            sources[target] = WeightSource((stored[0][0],))
            continue
        converter = by_pattern[pattern]
        names = tuple(key for key, _ in stored)
        patterns = [str(part) for _, part in stored]
        for other in converter.target_patterns:
            name = target.replace(converter.target_patterns[0], other)
            sources[name] = WeightSource(names, _conversion(model, converter, target, name, names, patterns))
    return sources


def _conversion(
    model: Any, converter: Any, target: str, name: str, keys: Sequence[str], patterns: Sequence[str]
) -> Callable[[list[Tensor]], Tensor]:
    """A function that makes the parameter ``name`` from its stored tensors."""

    def convert(tensors: list[Tensor]) -> Tensor:
        run = deepcopy(converter)
        for key, pattern, tensor in zip(keys, patterns, tensors, strict=True):
            run.add_tensor(target, key, pattern, tensor)
        made = run.convert(target, model=model, config=model.config)[name]
        value: Tensor = made[0] if isinstance(made, list) else made
        return value

    return convert
