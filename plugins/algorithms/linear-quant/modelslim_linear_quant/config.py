# SPDX-License-Identifier: Apache-2.0
"""The configuration of ``linear_quant``, as ``linear_quant.schema.json`` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelslim.api import FLOAT, QuantSpec, Selector, TensorSpec

DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True)
class LinearQuantConfig:
    """What to quantize and how.

    Attributes:
        selector: which linears.
        spec: what they become.
    """

    selector: Selector
    spec: QuantSpec

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> LinearQuantConfig:
        """Read an entry of ``process`` that its schema has accepted, filling in the defaults."""
        qconfig = entry["qconfig"]
        return cls(
            Selector(tuple(entry.get("include", ("*",))), tuple(entry.get("exclude", ()))),
            QuantSpec(_weight(qconfig["weight"]), _activation(qconfig.get("act"))),
        )


def _weight(leaf: Mapping[str, Any]) -> TensorSpec:
    scope = leaf.get("scope", "per_channel")
    group_size = None
    if scope == "per_group":
        group_size = leaf.get("group_size", leaf.get("ext", {}).get("group_size", DEFAULT_GROUP_SIZE))
    return TensorSpec(leaf.get("dtype", "int8"), scope, leaf.get("symmetric", True), group_size)


def _activation(leaf: Mapping[str, Any] | None) -> TensorSpec:
    if leaf is None or leaf.get("dtype", "int8") == "float" or leaf.get("method", "minmax") == "none":
        return FLOAT
    scope = leaf.get("scope", "per_tensor")
    return TensorSpec("int8", scope, leaf.get("symmetric", scope == "per_token"))
