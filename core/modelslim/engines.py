# SPDX-License-Identifier: Apache-2.0
"""What inference engines load, as data: a contract per version of an engine, in JSON files that plugins may add to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from modelslim.errors import PluginError, UsageError, nearest
from modelslim.registry import Registry
from modelslim.types import QuantSpec, TensorSpec

DENSE, EXPERTS = "dense", "experts"


@dataclass(frozen=True)
class Operand:
    """What an engine takes for one operand; an empty choice takes everything.

    Attributes:
        dtype: as of ``TensorSpec``.
        scope: who may share a scale.
        symmetric: None for symmetric or not.
        group_size: inputs that may share a scale, where some do.
        group_rows: rows that may share a scale, where some do.
        sparse: whether the weight is one that is made to be compressed.
    """

    dtype: str
    scope: tuple[str, ...] = ()
    symmetric: bool | None = None
    group_size: tuple[int, ...] = ()
    group_rows: tuple[int, ...] = ()
    sparse: bool = False

    def misfits(self, spec: TensorSpec) -> Iterator[str]:
        """What of an operand the engine does not take, in words such as ``per_channel, not per_group``."""
        if spec.dtype != self.dtype:
            yield f"{self.dtype}, not {spec.dtype}"
            return
        if self.scope and spec.scope not in self.scope:
            yield f"{' or '.join(self.scope)}, not {spec.scope}"
            return
        if self.symmetric is not None and spec.symmetric != self.symmetric:
            yield "symmetric, not asymmetric" if self.symmetric else "asymmetric, not symmetric"
        if spec.sparse != self.sparse:
            yield "sparse, not plain" if self.sparse else "plain, not sparse"
        if self.group_size and spec.group_size and spec.group_size not in self.group_size:
            yield f"group_size {_either(self.group_size)}, not {spec.group_size}"
        if self.group_rows and spec.group_rows > 1 and spec.group_rows not in self.group_rows:
            yield f"group_rows {_either(self.group_rows)}, not {spec.group_rows}"


@dataclass(frozen=True)
class Scheme:
    """A scheme that an engine runs.

    Attributes:
        name: as ``QuantSpec.scheme`` has it.
        weight: what the weight may be.
        activation: what the input may be.
        places: ``dense``, ``experts`` or both.
        in_multiple: the inputs that a rank holds must be a multiple of this.
        out_multiple: the outputs must be a multiple of this.
        max_tp: the degree of tensor parallelism must divide this; 0 for any.
    """

    name: str
    weight: Operand
    activation: Operand
    places: frozenset[str]
    in_multiple: int = 1
    out_multiple: int = 1
    max_tp: int = 0

    def misfits(self, spec: QuantSpec) -> list[str]:
        """What of a linear's spec differs; empty when it is this scheme."""
        return [
            *(f"weight {what}" for what in self.weight.misfits(spec.weight)),
            *(f"activation {what}" for what in self.activation.misfits(spec.activation)),
        ]


@dataclass(frozen=True)
class FormatRules:
    """How an engine reads one format.

    Attributes:
        schemes: all that it runs; None where that is not known.
        fused: neighbours, by the last part of their names, of which it makes one linear, by that of the one.
        experts_share_scheme: True when all linears of a layer's experts must have one scheme.
        multiplied_inputs: True when it has linears whose input is multiplied first.
        stacked_experts: True when it takes float experts that are stored as one tensor per layer.
        caches: what key/value caches may become; None where that is not known.
        float_linears: linears that must stay float, by the end of their names, and why.
        row_parallel: linears that tensor parallelism cuts along their inputs, by the last part of their names.
        index: the index file that it reads; empty when it reads none.
        files: files that must be there.
        config_with: keys that config.json must have.
        config_without: keys that config.json must not have.
    """

    schemes: tuple[Scheme, ...] | None = None
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    experts_share_scheme: bool = False
    multiplied_inputs: bool = False
    stacked_experts: bool = True
    caches: tuple[Operand, ...] | None = None
    float_linears: Mapping[str, str] = field(default_factory=dict)
    row_parallel: frozenset[str] = frozenset()
    index: str = ""
    files: tuple[str, ...] = ()
    config_with: tuple[str, ...] = ()
    config_without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contract:
    """What one version of an engine loads.

    Attributes:
        engine: the word for ``--engine``.
        version: the version that is described; empty when it is not known.
        title: the engine's name in messages.
        evidence: where the facts come from.
        formats: the rules by the name of the saver that writes the format.
        file: where all this stands.
    """

    engine: str
    version: str
    title: str
    evidence: str
    formats: Mapping[str, FormatRules]
    file: Path

    @property
    def name(self) -> str:
        """Engine and version, which is the name of the file as well."""
        return f"{self.engine}-{self.version}" if self.version else self.engine


def read_contracts(registry: Registry) -> list[Contract]:
    """The contracts of all installed distributions, of each engine the oldest first.

    Raises:
        PluginError: a file is no contract, or is not named after its engine and version.
    """
    folders = [registry.resource("engines", name) for name in registry.names("engines")]
    return [contract for folder in folders for contract in _read_folder(folder)]


def find_contract(name: str, registry: Registry) -> Contract:
    """The contract of an engine.

    Args:
        name: its name, in any case, for the newest version that is known; with a hyphen and a version, or the
            beginning of one, for that version, as in ``vllm-ascend-0.23``.
        registry: the installed plugins.

    Raises:
        UsageError: no contract is known of it.
        PluginError: as of :func:`read_contracts`.
    """
    contracts = read_contracts(registry)
    wanted = name.casefold()
    found = [one for one in contracts if one.engine == wanted] or [
        one for one in contracts if one.name == wanted or one.name.startswith(f"{wanted}.")
    ]
    if not found:
        known = [word for one in contracts for word in (one.engine, one.name)]
        raise UsageError(f"no contract is known of the engine {name!r}", hint=nearest(wanted, known))
    return max(found, key=_order)


def _order(contract: Contract) -> Version:
    return Version(contract.version or "0")


@cache
def _read_folder(folder: Path) -> tuple[Contract, ...]:
    return tuple(sorted((_read(file) for file in sorted(folder.glob("*.json"))), key=_order))


def _read(file: Path) -> Contract:
    from jsonschema import Draft7Validator
    from jsonschema.exceptions import best_match

    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PluginError(f"{file} cannot be read as JSON: {error}", hint="reinstall what it belongs to") from error
    schema = json.loads(files("modelslim.schemas").joinpath("engine_contract.json").read_text(encoding="utf-8"))
    mistake = best_match(Draft7Validator(schema).iter_errors(value))
    if mistake is not None:
        raise PluginError(
            f"{file} is no contract of an engine: {mistake.json_path}: {mistake.message}",
            hint="its form is that of engine_contract.json in modelslim.schemas",
        )
    try:
        Version(value.get("version", "0"))
    except InvalidVersion:
        raise PluginError(f"{file}: {value['version']!r} is no version", hint="such as 0.23.0") from None
    formats = {name: _rules(rules) for name, rules in value["formats"].items()}
    contract = Contract(value["engine"], value.get("version", ""), value["title"], value["evidence"], formats, file)
    if file.stem != contract.name:
        raise PluginError(f"{file}: a contract of {contract.name} is called {contract.name}.json", hint="rename it")
    return contract


def _rules(value: Mapping[str, Any]) -> FormatRules:
    return FormatRules(
        tuple(map(_scheme, value["schemes"])) if "schemes" in value else None,
        value.get("fused", {}),
        value.get("experts_share_scheme", False),
        value.get("multiplied_inputs", False),
        value.get("stacked_experts", True),
        tuple(map(_operand, value["caches"])) if "caches" in value else None,
        value.get("float", {}),
        frozenset(value.get("row_parallel", ())),
        value.get("index", ""),
        tuple(value.get("files", ())),
        tuple(value.get("config_with", ())),
        tuple(value.get("config_without", ())),
    )


def _scheme(value: Mapping[str, Any]) -> Scheme:
    return Scheme(
        value["name"],
        _operand(value["weight"]),
        _operand(value["activation"]),
        frozenset(value["for"]),
        value.get("in_multiple", 1),
        value.get("out_multiple", 1),
        value.get("max_tp", 0),
    )


def _operand(value: Mapping[str, Any]) -> Operand:
    return Operand(
        value["dtype"],
        tuple(value.get("scope", ())),
        value.get("symmetric"),
        tuple(value.get("group_size", ())),
        tuple(value.get("group_rows", ())),
        value.get("sparse", False),
    )


def _either(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
