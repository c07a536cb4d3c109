# SPDX-License-Identifier: Apache-2.0
"""What the entries of ``process`` say, as their schemas describe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelslim.api import LinearInfo, Pattern, QuantSpec, Selector, Subgraph, TensorSpec, parse_qconfig

NON_FUSION = "non-fusion"
ORDER = ("up-down", "ov", "linear-linear", "norm-linear")
"""Types of subgraphs in the order of work: dividing an up projection changes a weight that reads a norm."""

DYNAMIC_INT8 = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token"))

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
    def parse(cls, entry: Mapping[str, Any], types: Sequence[str] | None = None) -> Choice:
        """Read it from an entry; with ``types``, which the entry cannot choose then."""
        types = entry.get("enable_subgraph_type", ORDER) if types is None else types
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
        """Those of the types, in the order of work."""
        chosen = [subgraph for subgraph in subgraphs if subgraph.type in self.types]
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
        return cls(parse_qconfig(qconfig), steps, path)
