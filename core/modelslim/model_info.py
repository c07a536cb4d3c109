# SPDX-License-Identifier: Apache-2.0
"""What a model on meta tells: its units, its linears and their stored names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from modelslim.errors import ModelError, nearest
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

    def is_whole(self, size: int) -> bool:
        """True when each part is made of whole blocks of so many rows; the last one may be smaller."""
        return size == 1 or all(rows.step in (None, 1) and not (rows.start or 0) % size for rows in self.rows)


@dataclass(frozen=True)
class Kept:
    """A weight that stays float whatever the protocol says.

    Attributes:
        shape: its shape.
        why: ``router``, ``stacked experts`` (that no adapter takes apart), or ``no linear``.
    """

    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class ModelInfo:
    """The structure that a plan works on.

    Attributes:
        units: names of the units, in the order of the forward.
        linears: every linear that can be quantized, by name, in the model's order.
        dtype: the model's dtype: that of most of its parameters.
        modules: names of all modules.
        kept: weights of the units that stay float whatever the protocol says, by name.
        banks: what the modules that hold fused experts hold, by name.
    """

    units: Sequence[str]
    linears: Mapping[str, LinearInfo]
    dtype: str
    modules: frozenset[str]
    kept: Mapping[str, Kept]
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
        ModelError: there is no unit, the model has none of its name, it is visited twice, or units lie inside
            each other.
    """
    units = [request.name for request in visit]
    modules = dict(model.named_modules())
    _check_units(units, modules)
    known = set(units)
    linears: dict[str, LinearInfo] = {}
    kept: dict[str, Kept] = {}
    banks: dict[str, Bank] = {}
    experts = _numbers_of_experts(modules)
    for name, module in modules.items():
        unit = next((outer for outer in _self_and_parents(name) if outer in known), "")
        router = _is_router(name, module, experts)
        if isinstance(module, nn.Linear) and _is_product(module) and not router:
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
                    stacked = parameter.dim() == 3 and "expert" in f"{name}.{attribute} {type(module).__name__}".lower()
                    why = "router" if router else "stacked experts" if stacked else "no linear"
                    kept[f"{name}.{attribute}"] = Kept(tuple(parameter.shape), why)
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        key = dtype_name(parameter.dtype)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return ModelInfo(units, linears, max(sizes, key=lambda key: sizes[key]), frozenset(modules), kept, banks)


def other_matrices(
    model: nn.Module, info: ModelInfo, loader: Loader, shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """Owners of weights with two or more dimensions that are no linears of the model, by stored name; no embeddings.

    Args:
        model: on meta.
        info: what ``describe`` found in it.
        loader: knows the stored names.
        shapes: every stored tensor with its shape.
    """
    embeddings = {_stored_name(name, loader) for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    stored = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    owners = {name for name in stored if f"{name}.weight" in shapes}
    return frozenset(owners - embeddings - {linear.stored for linear in info.linears.values()})


def stated_numbers(config: Any, names: Sequence[str]) -> Iterator[int]:
    """Numbers in config.json under any of these names, at whatever depth."""
    if isinstance(config, Mapping):
        yield from (config[name] for name in names if isinstance(config.get(name), int))
        for part in config.values():
            yield from stated_numbers(part, names)


def vocabularies(model: nn.Module, config: Mapping[str, Any]) -> frozenset[int]:
    """Sizes that a vocabulary of the model has, by config.json, or where that says none, by its largest embedding."""
    tables = [len(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)]
    return frozenset(stated_numbers(config, ("vocab_size",))) or frozenset([max(tables, default=0)])


def _numbers_of_experts(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many experts lie directly in a module, by its name; also for stacked ones that no adapter takes apart."""
    numbers = {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if last == "experts":
            stacked = (parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
            size = len(module) if isinstance(module, nn.ModuleList) else getattr(module, "num_experts", None)
            numbers[parent] = size if isinstance(size, int) else next(stacked, 0)
    return numbers


def _is_product(linear: nn.Linear) -> bool:
    """False for a subclass that answers with something else than the product, such as a choice of experts."""
    if type(linear).forward is nn.Linear.forward or not linear.weight.is_meta:
        return True
    row = torch.empty((1, linear.in_features), dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        answer = type(linear).forward(linear, row)
    except (TypeError, ValueError, RuntimeError):  # it wants other arguments, or other shapes
        return False
    return isinstance(answer, torch.Tensor) and answer.shape == (1, linear.out_features)


def _is_router(name: str, module: nn.Module, experts: Mapping[str, int]) -> bool:
    """True for a linear beside experts with an output for each of them, or a single one, the gate of a shared expert.

    Engines have neither of them quantized.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or ".experts." in name:
        return False
    return any(len(weight) in (experts[parent], 1) for parent in _self_and_parents(name)[:-1] if parent in experts)


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
    if source.name:
        return source.name
    stem = source.keys[0].removesuffix(".weight")
    return stem if all(key.startswith(f"{stem}.weight") for key in source.keys) else None


def _check_units(units: Sequence[str], modules: Collection[str]) -> None:
    if not units:
        raise ModelError("the adapter visits no unit", hint="generate_model_visit must yield the model's layers")
    unknown = next((unit for unit in units if unit not in modules), None)
    if unknown is not None:
        raise ModelError(
            f"the adapter visits {unknown}, and the model has no module of that name",
            hint=nearest(unknown, modules) or "a unit is called as model.get_submodule finds it",
        )
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
