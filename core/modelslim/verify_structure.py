# SPDX-License-Identifier: Apache-2.0
"""Whether a quantized checkpoint holds what its model wants: no tensor too few, none too many, all in shape."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from torch import nn

from modelslim.checkpoint import Checkpoint, StoredTensor
from modelslim.edits import stored_name
from modelslim.errors import ModelError, nearest
from modelslim.loader import Loader
from modelslim.model_info import ModelInfo
from modelslim.saver import PlannedModel, SavedCache, SavedLinear
from modelslim.types import LinearInfo, Problem, QuantSpec


@dataclass(frozen=True)
class Expected:
    """What a model wants of its checkpoint.

    Attributes:
        model: the model on meta.
        info: its structure.
        loader: knows which float tensors make which parameter.
        source: the float checkpoint; None when only the result itself is there to tell.
        left_out: tensors that no parameter takes and that are there nevertheless, such as layers of multi-token
            prediction; None when nobody knows.
        added: stored names of biases that smoothing has added to the architecture.
    """

    model: nn.Module
    info: ModelInfo
    loader: Loader
    source: Checkpoint | None
    left_out: frozenset[str] | None
    added: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Result:
    """A quantized checkpoint beside what is expected of it.

    Attributes:
        expected: what the model wants.
        tensors: every tensor of the result.
        saved: its quantized linears, by stored name.
        caches: its quantized key/value caches, by the stored name of the linear that fills each.
    """

    expected: Expected
    tensors: Mapping[str, StoredTensor]
    saved: Mapping[str, SavedLinear]
    caches: Mapping[str, SavedCache] = field(default_factory=dict)

    @cached_property
    def held(self) -> frozenset[str]:
        """Names of the tensors of quantized linears and caches."""
        linears = {name for linear in self.saved.values() for name in linear.tensors}
        return frozenset(linears.union(*(cache.tensors for cache in self.caches.values())))

    @cached_property
    def linears(self) -> Mapping[str, LinearInfo]:
        """The model's linears by stored name."""
        return {linear.stored: linear for linear in self.expected.info.linears.values()}

    @cached_property
    def specs(self) -> Mapping[str, QuantSpec]:
        """What the quantized linears are, by name in the model."""
        return {linear.name: self.saved[stored].spec for stored, linear in self.linears.items() if stored in self.saved}

    @property
    def floats(self) -> list[str]:
        """Names of the linears that are float."""
        return [linear.name for stored, linear in self.linears.items() if stored not in self.saved]

    def planned(self, config: Mapping[str, object], multiplied: Collection[str]) -> PlannedModel:
        """The result as savers and engines look at a plan.

        Args:
            config: its config.json.
            multiplied: names of the linears whose input is multiplied.
        """
        weights = {f"{stored}.weight" for stored in self.saved}
        linears = {
            name: replace(linear, has_multiplier=name in multiplied)
            for name, linear in self.expected.info.linears.items()
        }
        return PlannedModel(
            config,
            self.expected.info.dtype,
            linears,
            self.specs,
            frozenset(weights | (self.tensors.keys() - self.held)),
            cache_specs={name: cache.spec for name, cache in self.caches.items()},
        )


def check_structure(result: Result) -> Iterator[Problem]:
    """Everything that is missing, superfluous or of the wrong form, and what of the model is left float."""
    expected = result.expected
    unknown = [stored for stored in (*result.saved, *result.caches) if stored not in result.linears]
    for stored in unknown:
        yield Problem(
            f"{stored} is quantized and is no linear of the model", nearest(stored, result.linears), linear=stored
        )
    used = set(result.held)
    whole = _quantized_modules(result)
    yield from _mixed_experts(result)
    for parameter, meta in expected.loader.parameters.items():
        owner = parameter.rpartition(".")[0]
        if owner in whole:
            continue
        wanted = _stored_parts(result, parameter, owner)
        if wanted is None:
            yield Problem(f"nothing in the checkpoint makes {parameter}", "weights and config.json must fit")
            continue
        absent = [name for name in wanted if name not in result.tensors]
        used.update(wanted)
        if absent:
            linear = next((one for one in result.linears.values() if one.module == owner), None)
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            what = f"{linear.name} is neither quantized nor float: " if linear is not None else ""
            yield Problem(f"{what}{absent[0]}{more}, which makes {parameter}, is missing", "quantize again")
            continue
        yield from _check_form(result, parameter, tuple(meta.shape), wanted)
    yield from _superfluous(result, used)
    yield from _float_experts(result)


def _quantized_modules(result: Result) -> frozenset[str]:
    """Modules whose weights are quantized, and those of which a part is, of which another rule tells."""
    return frozenset(linear.module for stored, linear in result.linears.items() if stored in result.saved)


def added_biases(model: nn.Module, loader: Loader, rescaled: Collection[str] | None) -> frozenset[str]:
    """Stored names of biases that smoothing has added, or may have added where nobody knows.

    Args:
        model: the model on meta.
        loader: knows its parameters and their stored names.
        rescaled: full names of the parameters that smoothing has changed or added; None when nobody knows.
    """
    if rescaled is None:
        weights = ((name, module._parameters.get("weight")) for name, module in model.named_modules())
        rescaled = [f"{name}.bias" for name, weight in weights if weight is not None and weight.dim() == 1]
    added = (name for name in rescaled if name.endswith(".bias") and name not in loader.parameters)
    return frozenset(stored_name(name, loader.sources) for name in added)


def _mixed_experts(result: Result) -> Iterator[Problem]:
    for name, bank in result.expected.info.banks.items():
        every = [linear.stored for row in bank.linears for linear in row]
        lacking = [stored for stored in every if stored not in result.saved]
        if lacking and len(lacking) < len(every):
            floats = [stored for stored in lacking if f"{stored}.weight" in result.tensors]
            fate = "is float" if floats else "is missing"
            first = (floats or lacking)[0]
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            yield Problem(
                f"{first}{more} {fate}, while other experts of {name} are quantized",
                "all linears of the experts of a layer must have one scheme",
                linear=first,
            )


def _stored_parts(result: Result, parameter: str, owner: str) -> Sequence[str] | None:
    """Names of the tensors that make a float parameter; None when no source is known."""
    try:
        source = result.expected.loader.source(parameter)
    except ModelError:
        return None
    bank = result.expected.info.banks.get(owner)
    if bank is not None and any(key not in result.tensors for key in source.keys):
        # Float experts that an algorithm changed are written one by one.
        part = parameter.rpartition(".")[2]
        return [f"{linear.stored}.{part}" for row in bank.linears for linear in row]
    return source.keys


def _check_form(result: Result, parameter: str, shape: tuple[int, ...], names: Sequence[str]) -> Iterator[Problem]:
    """Type and shape of the tensors that make a float parameter."""
    source = result.expected.source
    for name in names:
        stored = result.tensors[name]
        if not stored.torch_dtype.is_floating_point and source is None and len(names) == 1:
            yield Problem(
                f"{name} is {stored.dtype}, and the float parameter {parameter} is made of it", "quantize again"
            )
        origin = source.tensors.get(name) if source is not None else None
        if origin is not None and origin.shape != stored.shape:
            yield Problem(
                f"{name} has the shape {list(stored.shape)}, and {list(origin.shape)} in the float model",
                "quantize again",
            )
        if origin is not None and origin.dtype != stored.dtype:
            floats = origin.torch_dtype.is_floating_point and stored.torch_dtype.is_floating_point
            yield Problem(
                f"{name} is {stored.dtype}, and {origin.dtype} in the float model", "quantize again", fatal=not floats
            )
    if source is None and sum(prod(result.tensors[name].shape) for name in names) != prod(shape):
        shapes = ", ".join(str(list(result.tensors[name].shape)) for name in names[:3])
        yield Problem(f"{names[0]} has the shape {shapes}, and config.json asks for {list(shape)}", "quantize again")
    elif source is None and len(names) == 1 and _is_plain(result, parameter):
        stored = result.tensors[names[0]]
        if stored.shape != shape:
            yield Problem(
                f"{stored.name} has the shape {list(stored.shape)}, and config.json asks for {list(shape)}",
                "quantize again",
            )


def _is_plain(result: Result, parameter: str) -> bool:
    return result.expected.loader.source(parameter).convert is None


def _superfluous(result: Result, used: set[str]) -> Iterator[Problem]:
    """Tensors that no parameter takes; engines stop at them."""
    expected = result.expected
    known = used | expected.added | (expected.left_out or set())
    for name in sorted(result.tensors.keys() - known):
        yield Problem(
            f"{name} in {result.tensors[name].file.name} belongs to no parameter of the model",
            nearest(name, used) if used else "",
            # Of a checkpoint of another tool it is not known what the model was published with.
            fatal=expected.left_out is not None,
        )


def _float_experts(result: Result) -> Iterator[Problem]:
    """A warning when routed experts are float beside quantized linears: they are mostly the larger part."""
    experts = [linear for linear in result.linears.values() if ".experts." in linear.stored]
    floats = [linear for linear in experts if linear.stored not in result.saved]
    stacked = [name for name, kept in result.expected.info.kept.items() if kept.why == "stacked experts"]
    if not result.saved or not (floats or stacked):
        return
    total = sum(parameter.numel() for parameter in result.expected.model.parameters())
    size = sum(one.out_features * one.in_features for one in floats)
    size += sum(prod(result.expected.info.kept[name].shape) for name in stacked)
    first = floats[0].name if floats else stacked[0]
    yield Problem(
        f"{len(floats) + len(stacked)} weights of routed experts, such as {first}, are float: {size / total:.0%} of "
        "all parameters",
        "quantize them, unless this is what you want",
        fatal=False,
    )
