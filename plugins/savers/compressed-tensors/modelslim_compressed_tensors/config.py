# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of config.json: made from what was written, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelslim.api import FLOAT, ModelError, PlannedModel, QuantSpec, TensorRecord, nearest
from modelslim_compressed_tensors.arguments import arguments, parse
from modelslim_compressed_tensors.caches import SCHEME
from modelslim_compressed_tensors.formats import FORMATS, MIXED, VERSION, Format, format_of
from modelslim_compressed_tensors.targets import cover, matches

METHOD = "compressed-tensors"
LINEAR = "Linear"
"""The target that stands for every linear of a model."""


def quantization_config(records: Sequence[TensorRecord], model: PlannedModel) -> dict[str, Any] | None:
    """What the engine must know of the quantized linears; None when there are none."""
    specs = {_owner(record.name): record.spec for record in records if record.spec is not None}
    if not specs:
        return None
    groups: dict[QuantSpec, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(_described(spec), []).append(name)
    # Readers take the first group that names experts for that of the routed ones.
    ordered = sorted(groups.items(), key=lambda group: not any(".experts." in name for name in group[1]))
    outside = {linear.stored for linear in model.linears.values() if not linear.unit}
    described = {}
    for number, (spec, names) in enumerate(ordered):
        described[f"group_{number}"] = {
            "targets": _targets(names, specs.keys() - set(names), outside),
            "weights": arguments(spec.weight, inputs=False),
            "input_activations": None if spec.activation.is_float else arguments(spec.activation, inputs=True),
            "output_activations": None,
            "format": format_of(spec).name,
        }
    formats = {group["format"] for group in described.values()}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "quantization_status": "compressed",
        "format": MIXED if len(formats) > 1 else formats.pop(),
        "config_groups": described,
        "ignore": _ignored(model, specs.keys()),
        "kv_cache_scheme": dict(SCHEME) if model.caches else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _described(spec: QuantSpec) -> QuantSpec:
    """The spec without what config.json does not say."""
    return QuantSpec(replace(spec.weight, scale_dtype="float32"), replace(spec.activation, scale_dtype="float32"))


def _targets(names: Iterable[str], others: Iterable[str], outside: frozenset[str] | set[str]) -> list[str]:
    """The linears of one scheme.

    Args:
        names: them.
        others: linears of other schemes.
        outside: linears outside the layers, which engines do not count among those that ``Linear`` stands for.
    """
    others = set(others)
    if others:
        # Engines may look for the class before they look for the parts of a fused linear.
        return cover(names, others)
    return [LINEAR, *cover((name for name in names if name in outside), ())]


def _ignored(model: PlannedModel, quantized: Iterable[str]) -> list[str]:
    """Whatever an engine may take for a linear and that stays float."""
    quantized = set(quantized)
    names = set(model.matrices)
    for linear in model.linears.values():
        # A head that shares the weight of the embedding is stored as that.
        tied = linear.stored.rpartition(".")[2] != linear.name.rpartition(".")[2]
        names.add(linear.name if tied else linear.stored)
    names -= quantized
    plain = sorted(name for name in names if "." not in name)
    return [*plain, *cover(sorted(name for name in names if "." in name), quantized)]


@dataclass(frozen=True)
class Group:
    """A group of config.json.

    Attributes:
        targets: which linears it is for.
        spec: their scheme.
        format: how they are stored.
    """

    targets: tuple[str, ...]
    spec: QuantSpec
    format: Format


@dataclass(frozen=True)
class Groups:
    """All groups of config.json, and the linears that are in none.

    Attributes:
        groups: them.
        ignore: names and patterns of linears that stay float.
    """

    groups: Sequence[Group]
    ignore: Sequence[str]

    def of(self, name: str) -> Group | None:
        """The group that names a linear, or the one for every linear; None when it stays float."""
        if any(matches(name, ignored) for ignored in self.ignore):
            return None
        named = (group for group in self.groups if any(matches(name, target) for target in group.targets))
        return next(named, next((group for group in self.groups if LINEAR in group.targets), None))

    def names(self, name: str) -> bool:
        """True when a group names the linear, by itself or in a pattern."""
        group = self.of(name)
        return group is not None and any(matches(name, target) for target in group.targets)


def read_groups(config: Mapping[str, Any], place: str) -> Groups:
    """The way back, for any writer's config.json.

    Args:
        config: ``quantization_config``.
        place: where it stands, for messages.

    Raises:
        ModelError: it has what is not known here, and what would make the model compute something else.
    """
    if config.get("transform_config"):
        raise ModelError(f"{place}: transform_config asks for online transforms, which are not known here")
    found = config.get("config_groups")
    if not isinstance(found, dict) or not all(isinstance(group, dict) for group in found.values()):
        raise ModelError(f"{place}: config_groups are missing, or are no objects")
    groups = []
    for key, group in found.items():
        where = f"{place}: {key}"
        if group.get("output_activations"):
            raise ModelError(f"{where}: output_activations are not known here")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict):
            raise ModelError(f"{where}: has no weights")
        spec = QuantSpec(parse(weights, f"{where}: weights", inputs=False), FLOAT)
        if inputs:
            spec = replace(spec, activation=parse(inputs, f"{where}: input_activations", inputs=True))
        word = group.get("format") or config.get("format")
        known = {one.name: one for one in FORMATS}
        if word not in known:
            raise ModelError(f"{where}: the format {word!r} is not known here", hint=nearest(str(word), known))
        form = format_of(spec)
        if (known[word].codes, known[word].scales) != (form.codes, form.scales):
            raise ModelError(f"{where}: the format {word!r} does not hold {spec.scheme}; {form.name} does")
        groups.append(Group(tuple(group.get("targets", ())), spec, form))
    return Groups(groups, config.get("ignore") or ())
