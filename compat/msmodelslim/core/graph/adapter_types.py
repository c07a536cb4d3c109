# SPDX-License-Identifier: Apache-2.0
"""How an adapter describes what smoothing may rescale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED_SUBGRAPH_TYPES = ["norm-linear", "linear-linear", "ov", "up-down"]


@dataclass
class MappingConfig:
    """Which modules share a scale.

    Attributes:
        targets: linears whose input columns are multiplied.
        source: module whose output is divided; None when nothing can take the inverse.
    """

    targets: list[str]
    source: str | None = None


@dataclass
class FusionConfig:
    """How the source of a subgraph holds several projections in one weight.

    Attributes:
        fusion_type: ``none``, ``qkv``, ``kv`` or ``custom``.
        num_attention_heads: query heads; for ``qkv`` and ``kv``.
        num_key_value_heads: key/value heads; for ``qkv``.
        custom_config: sizes of other layouts; for ``kv`` and ``custom``.

    Raises:
        ValueError: the type is unknown, or what it needs is missing.
    """

    fusion_type: str = "none"
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    custom_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        needs = {
            "none": (),
            "qkv": ("num_attention_heads", "num_key_value_heads"),
            "kv": ("num_attention_heads", "custom_config"),
            "custom": ("custom_config",),
        }
        if self.fusion_type not in needs:
            raise ValueError(f"unknown fusion_type {self.fusion_type!r}; known: {', '.join(needs)}")
        missing = [name for name in needs[self.fusion_type] if not getattr(self, name)]
        if missing:
            raise ValueError(f"fusion_type {self.fusion_type!r} needs {' and '.join(missing)}")


@dataclass
class AdapterConfig:
    """One subgraph.

    Attributes:
        subgraph_type: one of ``SUPPORTED_SUBGRAPH_TYPES``.
        mapping: its modules.
        fusion: how its source is laid out, where it is fused.
        extra_config: options of the algorithm.

    Raises:
        ValueError: the type is unknown.
    """

    subgraph_type: str
    mapping: MappingConfig
    fusion: FusionConfig | None = None
    extra_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.subgraph_type not in SUPPORTED_SUBGRAPH_TYPES:
            known = ", ".join(SUPPORTED_SUBGRAPH_TYPES)
            raise ValueError(f"unknown subgraph_type {self.subgraph_type!r}; known: {known}")
