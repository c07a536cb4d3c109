# SPDX-License-Identifier: Apache-2.0
"""Planned models for all tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from modelslim.api import LinearInfo, PlannedModel, QuantSpec, TensorSpec

SPECS = {
    "W8A8": QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor", symmetric=False)),
    "W8A8_DYNAMIC": QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token")),
    "W8A8_MXFP8": QuantSpec(
        TensorSpec("mxfp8", "per_block", group_size=32), TensorSpec("mxfp8", "per_block", group_size=32)
    ),
    "W4A4_MXFP4": QuantSpec(
        TensorSpec("mxfp4", "per_block", group_size=32), TensorSpec("mxfp4", "per_block", group_size=32)
    ),
}


def plan(specs: Mapping[str, QuantSpec | None], config: Mapping[str, Any] | None = None) -> PlannedModel:
    """A planned model with these linears (None: float), 64 x 64."""
    linears = {name: LinearInfo(name, name, "", 64, 64, False, "bfloat16") for name in specs}
    chosen = {name: spec for name, spec in specs.items() if spec is not None}
    return PlannedModel(config or {}, "bfloat16", linears, chosen, frozenset(f"{name}.weight" for name in specs))


@pytest.fixture
def specs() -> Mapping[str, QuantSpec]:
    """Every scheme of the format, by its type."""
    return SPECS


@pytest.fixture
def planned() -> Callable[..., PlannedModel]:
    """``plan``."""
    return plan
