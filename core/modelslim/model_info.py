# SPDX-License-Identifier: Apache-2.0
"""What a model on meta tells: its units, its linears and their stored names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import nn

from modelslim.errors import ModelError
from modelslim.experts import ExpertLinear
from modelslim.loader import Loader, dtype_name
from modelslim.types import LinearInfo, ProcessRequest


@dataclass(frozen=True)
class Bank:
    """The linears that one stacked weight of fused experts holds.

    Attributes:
        linears: [expert][part].
        rows: the rows of each part in an expert's weight.
    """

    linears: Sequence[Sequence[LinearInfo]]
    rows: Sequence[slice]


@dataclass(frozen=True)
class ModelInfo:
    """The structure that a plan works on.

    Attributes:
        units: names of the units, in the order of the forward.
        linears: every linear that can be quantized, by name, in the model's order.
        dtype: the model's dtype: that of most of its parameters.
        modules: names of all modules.
        fused: shapes of weights that no linear holds (routers, experts that no adapter takes apart), by
            name; they stay float.
        banks: what the modules that hold fused experts hold, by name.
    """

    units: Sequence[str]
    linears: Mapping[str, LinearInfo]
    dtype: str
    modules: frozenset[str]
    fused: Mapping[str, tuple[int, ...]]
    banks: Mapping[str, Bank]

    @cached_property
    def by_unit(self) -> Mapping[str, Sequence[LinearInfo]]:
        """The linears of each unit; those outside all units under the empty name."""
        groups: dict[str, list[LinearInfo]] = {"": [], **{unit: [] for unit in self.units}}
        for linear in self.linears.values():
            groups[linear.unit].append(linear)
        return groups

    @cached_property
    def holders(self) -> Mapping[str, Sequence[str]]:
        """Modules of each unit that hold its linears, in the model's order."""
        return {unit: list(dict.fromkeys(one.module for one in linears)) for unit, linears in self.by_unit.items()}


def describe(model: nn.Module, visit: Sequence[ProcessRequest], loader: Loader) -> ModelInfo:
    """Find the units and linears of a model on meta.

    Raises:
        ModelError: there is no unit, a unit is visited twice, or units lie inside each other.
    """
    units = [request.name for request in visit]
    _check_units(units)
    known = set(units)
    linears: dict[str, LinearInfo] = {}
    fused: dict[str, tuple[int, ...]] = {}
    banks: dict[str, Bank] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        unit = next((outer for outer in _self_and_parents(name) if outer in known), "")
        if isinstance(module, nn.Linear):
            stored = _stored_name(name, loader)
            if stored is not None:
                linears[name] = LinearInfo(
                    name,
                    stored,
                    unit,
                    module.out_features,
                    module.in_features,
                    module.bias is not None,
                    dtype_name(module.weight.dtype),
                )
                continue
        if isinstance(module, ExpertLinear):
            banks[name] = _expert_linears(name, module, unit, loader)
            linears.update((linear.name, linear) for expert in banks[name].linears for linear in expert)
            continue
        if unit:
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    fused[f"{name}.{attribute}"] = tuple(parameter.shape)
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        key = dtype_name(parameter.dtype)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return ModelInfo(units, linears, max(sizes, key=lambda key: sizes[key]), frozenset(modules), fused, banks)


def _expert_linears(name: str, module: ExpertLinear, unit: str, loader: Loader) -> Bank:
    """The linears of a stacked weight."""
    parent = name.rpartition(".")[0]
    source = loader.sources.get(f"{name}.weight")
    sizes = {part: len(range(module.out_features)[rows]) for part, rows in module.parts.items()}
    dtype = dtype_name(module.weight.dtype)
    result = []
    for expert in range(module.experts):
        names = [f"{parent}.{expert}.{part}" for part in sizes]
        stored = source.experts[expert] if source is not None and source.experts else names
        result.append(
            [
                LinearInfo(one, kept, unit, size, module.in_features, module.bias is not None, dtype, name)
                for one, kept, size in zip(names, stored, sizes.values(), strict=True)
            ]
        )
    return Bank(result, list(module.parts.values()))


def _stored_name(name: str, loader: Loader) -> str | None:
    """The linear's name in the checkpoint; None when it is put together from several stored weights."""
    source = loader.sources.get(f"{name}.weight")
    if source is None:
        return name  # tied to another parameter: it has no stored tensor of its own
    stem = source.keys[0].removesuffix(".weight")
    return stem if all(key.startswith(f"{stem}.weight") for key in source.keys) else None


def _check_units(units: Sequence[str]) -> None:
    if not units:
        raise ModelError("the adapter visits no unit", hint="generate_model_visit must yield the model's layers")
    if len(set(units)) != len(units):
        twice = next(unit for unit in units if units.count(unit) > 1)
        raise ModelError(f"the adapter visits {twice} twice", hint="a unit is quantized and written once")
    known = set(units)
    for unit in units:
        outer = next((parent for parent in _self_and_parents(unit) if parent != unit and parent in known), None)
        if outer:
            raise ModelError(f"the unit {unit} lies inside the unit {outer}", hint="visit one of them")


def _self_and_parents(name: str) -> list[str]:
    """``a.b.c`` as ``a``, ``a.b``, ``a.b.c``."""
    return list(accumulate(name.split("."), "{}.{}".format))
