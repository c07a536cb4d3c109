# SPDX-License-Identifier: Apache-2.0
"""The configuration of ``linear_quant``, as ``linear_quant.schema.json`` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelslim.api import QuantSpec, Selector, parse_qconfig


@dataclass(frozen=True)
class WeightMethod:
    """How weights are rounded.

    Attributes:
        name: ``minmax``, ``ssz``, ``mse`` or ``gptq``; of floating codes ``minmax``, ``mse``, ``mse_round``,
            ``fouroversix`` or ``ceil_x``.
        step: of ssz: how often a scale is fitted at most.
        error: of ssz and mse: ``output`` or ``weight``, the error that is minimized.
        range: of gptq: ``mse`` or ``minmax``, how the range of a row or group is found.
        percdamp: of gptq: what is added to the diagonal of the Hessian, as a share of its mean.
        block_size: of gptq: columns between two updates of the remaining ones.
        ceil_x_value: of ceil_x: what the largest value of a block is divided by.
        enable_search: of ceil_x: whether values from ``search_min`` to ``search_max`` are tried instead.
        search_min: the least of them.
        search_max: the largest of them.
        search_step: from one to the next.
        act_order: of gptq: whether columns with large inputs are rounded first.
    """

    name: str = "minmax"
    step: int = 50
    error: str = "output"
    range: str = "mse"
    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    ceil_x_value: float = 7.25
    enable_search: bool = False
    search_min: float = 6
    search_max: float = 12
    search_step: float = 0.25

    @property
    def sees_inputs(self) -> bool:
        """True when it wants to know something of the inputs."""
        return self.name == "gptq" or (self.name in ("ssz", "mse") and self.error == "output")


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
            parse_qconfig(qconfig),
            _method(qconfig["weight"]),
            "histogram" if act is not None and act.get("method") == "histogram" else "minmax",
            fallback.get("above"),
            None if to == "float" else cls.parse({"qconfig": to}),
        )


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
        ext.get("ceil_x_value", default.ceil_x_value),
        ext.get("enable_search", default.enable_search),
        ext.get("search_min", default.search_min),
        ext.get("search_max", default.search_max),
        ext.get("search_step", default.search_step),
    )
