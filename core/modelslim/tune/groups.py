# SPDX-License-Identifier: Apache-2.0
"""The linears that must share one scheme, since an engine makes one of them: the things that a budget decides on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modelslim.planned import PlannedLinear, fusions
from modelslim.saver import Saver
from modelslim.types import LinearInfo, QuantSpec

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Group:
    """Linears that get one scheme.

    Attributes:
        linears: the linears, in the order of the model; all of one unit.
    """

    linears: Sequence[LinearInfo]

    @property
    def name(self) -> str:
        """Of its first linear, and how many more there are."""
        first = self.linears[0].name
        return first if len(self.linears) == 1 else f"{first} and {len(self.linears) - 1} more"

    @property
    def unit(self) -> str:
        """The unit that holds it."""
        return self.linears[0].unit

    @property
    def names(self) -> list[str]:
        """Names of the linears."""
        return [linear.name for linear in self.linears]

    @property
    def weights(self) -> int:
        """How many weights the linears have, biases aside."""
        return sum(linear.out_features * linear.in_features for linear in self.linears)

    def float_bytes(self) -> int:
        """Bytes of the linears as they are, biases included."""
        return sum(
            (linear.out_features * linear.in_features + linear.out_features * linear.has_bias) * _BYTES[linear.dtype]
            for linear in self.linears
        )

    def encoded_bytes(self, specs: Mapping[str, QuantSpec], saver: Saver, dtype: str) -> int:
        """Bytes of the linears as a saver writes them with their specs."""
        return sum(sum(saver.encoded_sizes(linear, specs[linear.name], dtype).values()) for linear in self.linears)


def find_groups(linears: Iterable[LinearInfo]) -> list[Group]:
    """Groups of linears: q, k and v; gate and up; all experts of a layer; every other one by itself.

    Args:
        linears: those that take part, in the order of the model.
    """
    planned = [PlannedLinear(linear, None) for linear in linears]
    leader = {one.info.name: one.info.name for one in planned}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    experts: dict[str, str] = {}
    for one in planned:
        if one.moe:
            leader[one.info.name] = find(experts.setdefault(one.moe, one.info.name))
    for _, members in fusions(planned):
        first = find(members[0].info.name)
        for member in members[1:]:
            leader[find(member.info.name)] = first
    groups: dict[str, list[LinearInfo]] = {}
    for one in planned:
        groups.setdefault(find(one.info.name), []).append(one.info)
    return [Group(members) for members in groups.values()]
