# SPDX-License-Identifier: Apache-2.0
"""Which stored tensors make which parameters, by the rules with which transformers itself loads a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from modelslim.api import ExpertLinear, WeightSource
from modelslim_transformers.expert_sources import is_stored_transposed, per_expert, stacked
from modelslim_transformers.experts import StackedExperts

Shapes = Mapping[str, tuple[int, ...]]
Stored = list[tuple[str, str | None]]
"""Stored names with the pattern of the conversion that takes them."""


def weight_sources(model: nn.Module, shapes: Shapes) -> Mapping[str, WeightSource]:
    """Group stored names by the parameter that transformers makes of them.

    Renames are followed; parameters that are put together from several stored tensors get a
    ``convert``. Stored tensors that the model does not know are left out.

    Args:
        model: the model, its experts fused.
        shapes: of all stored tensors, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, StackedExperts)}
    ours = _names_of_experts(experts)
    state = {ours.get(name, name): tensor for name, tensor in model.state_dict().items()}

    def rename(key: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if renamed not in state and key in state:
            # The rule was meant for another layout of the same family.
            renamed, pattern = rename_source_key(key, [], [], prefix, state)
        return renamed, pattern

    parts: dict[str, Stored] = {}
    for key in sorted(shapes, key=dot_natural_key):
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
    for path, module in experts.items():
        sources.update(_expert_sources(path, module, sources, parts, by_pattern, shapes))
    return {name: source for name, source in sources.items() if name not in ours.values()}


def _names_of_experts(experts: Mapping[str, StackedExperts]) -> dict[str, str]:
    """The parameters of fused experts, with the names that transformers has for them."""
    return {
        f"{path}.{name}.{parameter}": f"{path}.{name}{suffix}"
        for path, module in experts.items()
        for name, _ in module.named_children()
        for parameter, suffix in (("weight", ""), ("bias", "_bias"))
    }


def _expert_sources(
    path: str,
    module: StackedExperts,
    sources: Mapping[str, WeightSource],
    parts: Mapping[str, Stored],
    converters: Mapping[str, Any],
    shapes: Shapes,
) -> dict[str, WeightSource]:
    """The sources of one layer's experts, from those that transformers has for its own parameters."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, ExpertLinear)}
    found = {name: parts[f"{path}.{name}"] for name in linears if f"{path}.{name}" in parts}
    single = {name: stored[0][0] for name, stored in found.items() if len(stored) == 1}
    result = {}
    for name, stored in found.items():
        linear = linears[name]
        converter = converters.get(stored[0][1] or "")
        operations = [type(operation).__name__ for operation in converter.operations] if converter else []
        if name in single and operations in ([], ["Transpose"]):
            is_transposed = module.is_transposed
            if operations:
                is_transposed = is_stored_transposed(shapes, linears, single)
            source = stacked(linear, single[name], is_transposed)
        elif converter and operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            keys = [[key for key, taken in stored if taken == pattern] for pattern in converter.source_patterns]
            source = per_expert(linear, keys)
        else:
            source = sources[f"{path}.{name}"]
            names = tuple(tuple(f"{path}.{expert}.{part}" for part in linear.parts) for expert in range(linear.experts))
            convert = _then_transpose(source.convert) if module.is_transposed else source.convert
            source = replace(source, convert=convert, experts=names)
        result[f"{path}.{name}.weight"] = source
        if f"{path}.{name}_bias" in sources:
            result[f"{path}.{name}.bias"] = sources[f"{path}.{name}_bias"]
    return result


def _then_transpose(convert: Callable[[list[Tensor]], Tensor] | None) -> Callable[[list[Tensor]], Tensor]:
    def both(tensors: list[Tensor]) -> Tensor:
        made = tensors[0] if convert is None else convert(tensors)
        return made.transpose(1, 2).contiguous()

    return both


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
