# SPDX-License-Identifier: Apache-2.0
"""What the entries of ``process`` say, as their schemas describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelslim.api import FLOAT, LinearInfo, Pattern, QuantSpec, Selector, Subgraph, TensorSpec

NON_FUSION = "non-fusion"
ORDER = ("up-down", "ov", "linear-linear", "norm-linear")
"""Types of subgraphs in the order of work: dividing an up projection changes a weight that reads a norm."""

DYNAMIC_INT8 = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token"))

_GROUP_SIZE = 128
_SSZ_STEPS = 50


@dataclass(frozen=True)
class Choice:
    """Which subgraphs an entry works on.

    Attributes:
        types: their types, in the order of work.
        include, exclude: patterns of linears that read the tensor.
    """

    types: Sequence[str]
    include: Sequence[str]
    exclude: Sequence[str]

    @classmethod
    def parse(cls, entry: Mapping[str, Any], default: Sequence[str] = ORDER) -> Choice:
        """Read it from an entry."""
        types = entry.get("enable_subgraph_type", default)
        return cls(
            tuple(name for name in (*ORDER, NON_FUSION) if name in types),
            tuple(entry.get("include") or ("*",)),
            tuple(entry.get("exclude") or ()),
        )

    def patterns(self) -> Sequence[Pattern]:
        """The patterns with their places."""
        fields = (("include", self.include), ("exclude", self.exclude))
        return [((key, index), one) for key, names in fields for index, one in enumerate(names) if one != "*"]

    def linears(self, linears: Sequence[LinearInfo]) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the modules that hold the included and the excluded linears."""
        included = Selector(self.include).select(linears)
        excluded = Selector(self.exclude).select(linears)
        return frozenset(one.module for one in included), frozenset(one.module for one in excluded)

    def sorted(self, subgraphs: Sequence[Subgraph]) -> list[Subgraph]:
        """Those of the types that can be folded, in the order of work."""
        chosen = [subgraph for subgraph in subgraphs if subgraph.type in self.types and subgraph.source]
        return sorted(chosen, key=lambda subgraph: self.types.index(subgraph.type))


@dataclass(frozen=True)
class Rounding:
    """What a search rounds with.

    Attributes:
        spec: schemes of weight and input.
        steps: see ``rounding.round_weight``.
        path: where the entry says so.
    """

    spec: QuantSpec = DYNAMIC_INT8
    steps: int = 0
    path: tuple[str | int, ...] = field(default=())

    @classmethod
    def parse(cls, qconfig: Mapping[str, Any], path: tuple[str | int, ...]) -> Rounding:
        """Read it from a ``qconfig``, or from one with a weight alone."""
        weight = qconfig["weight"]
        steps = weight.get("ext", {}).get("step", _SSZ_STEPS) if weight.get("method") == "ssz" else 0
        return cls(QuantSpec(_weight(weight), _activation(qconfig.get("act"))), steps, path)


def _weight(leaf: Mapping[str, Any]) -> TensorSpec:
    scope = leaf.get("scope", "per_channel")
    group_size = None
    if scope == "per_group":
        group_size = leaf.get("group_size", leaf.get("ext", {}).get("group_size", _GROUP_SIZE))
    return TensorSpec(leaf.get("dtype", "int8"), scope, leaf.get("symmetric", True), group_size)


def _activation(leaf: Mapping[str, Any] | None) -> TensorSpec:
    if leaf is None or leaf.get("dtype", "int8") == "float" or leaf.get("method") == "none":
        return FLOAT
    scope = leaf.get("scope", "per_tensor")
    return TensorSpec(leaf.get("dtype", "int8"), scope, leaf.get("symmetric", scope == "per_token"))
