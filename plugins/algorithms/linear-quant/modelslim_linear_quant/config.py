# SPDX-License-Identifier: Apache-2.0
"""The configuration of ``linear_quant``, as ``linear_quant.schema.json`` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelslim.api import FLOAT, QuantSpec, Selector, TensorSpec

DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True)
class WeightMethod:
    """How weights are rounded.

    Attributes:
        name: ``minmax``, ``ssz``, ``mse`` or ``gptq``.
        step: of ssz: how often a scale is fitted at most.
        error: of mse: ``output`` or ``weight``, the error that the range minimizes.
        range: of gptq: ``mse`` or ``minmax``, how the range of a row or group is found.
        percdamp: of gptq: what is added to the diagonal of the Hessian, as a share of its mean.
        block_size: of gptq: columns between two updates of the remaining ones.
        act_order: of gptq: whether columns with large inputs are rounded first.
    """

    name: str = "minmax"
    step: int = 50
    error: str = "output"
    range: str = "mse"
    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = True

    @property
    def sees_inputs(self) -> bool:
        """True when it wants the Gram matrix of the inputs."""
        return self.name == "gptq" or (self.name == "mse" and self.error == "output")


@dataclass(frozen=True)
class LinearQuantConfig:
    """What to quantize and how.

    Attributes:
        selector: which linears.
        spec: what they become.
        weight: how their weights are rounded.
        activation: how the range of static activations is found: ``minmax`` or ``histogram``.
        above: relative error of a linear's output beyond which it falls back; None never does.
        to: what it falls back to; None is float.
    """

    selector: Selector
    spec: QuantSpec
    weight: WeightMethod = WeightMethod()
    activation: str = "minmax"
    above: float | None = None
    to: LinearQuantConfig | None = None

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> LinearQuantConfig:
        """Read an entry of ``process`` that its schema has accepted, filling in the defaults."""
        qconfig = entry["qconfig"]
        act = qconfig.get("act")
        fallback = entry.get("fallback", {})
        to = fallback.get("to", "float")
        return cls(
            Selector(tuple(entry.get("include", ("*",))), tuple(entry.get("exclude", ()))),
            QuantSpec(_weight(qconfig["weight"]), _activation(act)),
            _method(qconfig["weight"]),
            "histogram" if act is not None and act.get("method") == "histogram" else "minmax",
            fallback.get("above"),
            None if to == "float" else cls.parse({"qconfig": to}),
        )


def _weight(leaf: Mapping[str, Any]) -> TensorSpec:
    scope = leaf.get("scope", "per_channel")
    group_size = None
    if scope == "per_group":
        group_size = leaf.get("group_size", leaf.get("ext", {}).get("group_size", DEFAULT_GROUP_SIZE))
    return TensorSpec(leaf.get("dtype", "int8"), scope, leaf.get("symmetric", True), group_size)


def _method(leaf: Mapping[str, Any]) -> WeightMethod:
    ext = leaf.get("ext", {})
    default = WeightMethod(leaf.get("method", "minmax"))
    return WeightMethod(
        default.name,
        ext.get("step", default.step),
        ext.get("error", default.error),
        ext.get("range", default.range),
        ext.get("percdamp", default.percdamp),
        ext.get("block_size", default.block_size),
        ext.get("act_order", default.act_order),
    )


def _activation(leaf: Mapping[str, Any] | None) -> TensorSpec:
    if leaf is None or leaf.get("dtype", "int8") == "float" or leaf.get("method", "minmax") == "none":
        return FLOAT
    scope = leaf.get("scope", "per_tensor")
    return TensorSpec("int8", scope, leaf.get("symmetric", scope == "per_token"))
