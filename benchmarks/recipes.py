# SPDX-License-Identifier: Apache-2.0
"""The recipes that ``accuracy.py`` measures, and what the other tools offer at the same schemes."""

from __future__ import annotations

from dataclasses import dataclass

from common import DYNAMIC, FLOAT, INT8, STATIC

from modelslim.types import TensorSpec

GROUP = "scope: per_group, dtype: int4, group_size: 64"
OFFSET = f"{GROUP}, symmetric: false"
INT4 = "scope: per_channel, dtype: int4, symmetric: true"


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        scheme: what becomes what; rows of one scheme compete.
        method: how.
        process: the entries of ``process``.
        below: KL that it must stay below with the calibration set that ships.
        fallen: linears that may fall back.
        integers: the scheme of weights whose integers are compared with those of another tool.
    """

    scheme: str
    method: str
    process: tuple[str, ...]
    below: float | None = None
    fallen: int | None = None
    integers: TensorSpec | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.scheme}, {self.method}"


def linear(act: str, weight: str, more: str = "") -> str:
    """An entry of linear_quant over everything."""
    return f"{{type: linear_quant, qconfig: {{act: {{{act}}}, weight: {{{weight}}}}}{more}}}"


def smooth(alpha: float, types: str) -> str:
    """An entry of iter_smooth."""
    return f"{{type: iter_smooth, alpha: {alpha}, enable_subgraph_type: [{types}]}}"


FLEX_STATIC = f"{{type: flex_smooth_quant, qconfig: {{act: {{{STATIC}}}, weight: {{{INT8}}}}}}}"

RECIPES = (
    Recipe("W8A16", "rtn", (linear(FLOAT, INT8),), 0.003),
    Recipe("W8A16", "rtn, with offset", (linear(FLOAT, "scope: per_channel, dtype: int8, symmetric: false"),), 0.003),
    Recipe("W8A8 dynamic", "rtn", (linear(DYNAMIC, INT8),), integers=TensorSpec("int8", "per_channel")),
    Recipe(
        "W8A8 dynamic",
        "iter_smooth",
        (smooth(0.8, "norm-linear"), smooth(0.5, "ov, up-down"), linear(DYNAMIC, INT8)),
        0.010,
    ),
    Recipe("W8A8 dynamic", "flex_smooth_quant", ("{type: flex_smooth_quant}", linear(DYNAMIC, INT8)), 0.010),
    Recipe("W8A8 static", "rtn", (linear(STATIC, INT8),)),
    Recipe("W8A8 static", "iter_smooth", ("{type: iter_smooth}", linear(STATIC, INT8)), 0.06),
    Recipe(
        "W8A8 static",
        "iter_smooth, fallback",
        ("{type: iter_smooth}", linear(STATIC, INT8, ", fallback: {above: 0.085}")),
        0.04,
        fallen=3,
    ),
    Recipe("W8A8 static", "flex_smooth_quant", (FLEX_STATIC, linear(STATIC, INT8)), 0.05),
    Recipe(
        "W8A8 static",
        "flex_smooth_quant, fallback",
        (FLEX_STATIC, linear(STATIC, INT8, ", fallback: {above: 0.05}")),
        0.04,
    ),
    Recipe(
        "W4A16 g64",
        "rtn",
        (linear(FLOAT, f"{GROUP}, method: minmax"),),
        integers=TensorSpec("int4", "per_group", True, 64),
    ),
    Recipe("W4A16 g64", "mse", (linear(FLOAT, f"{GROUP}, method: mse"),)),
    Recipe("W4A16 g64", "gptq", (linear(FLOAT, f"{GROUP}, method: gptq"),), 0.23),
    Recipe(
        "W4A16 g64",
        "autoround",
        (f"{{type: autoround_quant, strategies: [{{qconfig: {{weight: {{{GROUP}}}}}}}]}}",),
        0.125,
    ),
    Recipe(
        "W4A16 g64 asymmetric",
        "rtn",
        (linear(FLOAT, f"{OFFSET}, method: minmax"),),
        integers=TensorSpec("int4", "per_group", False, 64),
    ),
    Recipe(
        "W4A16 g64 asymmetric",
        "awq, mse",
        (f"{{type: awq, weight_qconfig: {{{OFFSET}, method: minmax}}}}", linear(FLOAT, f"{OFFSET}, method: mse")),
        0.17,
    ),
    Recipe("W4A8 dynamic", "gptq", (linear(DYNAMIC, f"{INT4}, method: gptq"),), 0.6),
)

PEERS: dict[str, tuple[tuple[str, str], ...]] = {
    "llmcompressor": (
        ("W8A16", "rtn"),
        ("W8A8 dynamic", "rtn"),
        ("W8A8 dynamic", "smoothquant"),
        ("W8A8 static", "rtn"),
        ("W8A8 static", "smoothquant"),
        ("W4A16 g64", "rtn"),
        ("W4A16 g64", "gptq"),
        ("W4A16 g64", "awq"),
        ("W4A16 g64 asymmetric", "rtn"),
        ("W4A16 g64 asymmetric", "awq"),
        ("W4A8 dynamic", "rtn"),
        ("W4A8 dynamic", "gptq"),
    ),
    "auto-round": (
        ("W8A16", "rtn"),
        ("W8A8 dynamic", "rtn"),
        ("W4A16 g64", "rtn"),
        ("W4A16 g64", "optimized rtn"),
        ("W4A16 g64", "awq"),
        ("W4A16 g64", "autoround, 30 iterations"),
    ),
    "gptqmodel": (("W4A16 g64", "gptq"), ("W4A16 g64", "gptq, desc_act")),
}
