# SPDX-License-Identifier: Apache-2.0
"""Quantized linears of random numbers, and planned models, for all tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from modelslim.api import FLOAT, LinearInfo, PlannedModel, QuantizedLinear, QuantizedTensor, QuantSpec, TensorSpec


def spec_of(bits: int, group_size: int | None = None, symmetric: bool = True) -> QuantSpec:
    """The scheme of a weight of so many bits."""
    return QuantSpec(
        TensorSpec(f"int{bits}", "per_group" if group_size else "per_channel", symmetric, group_size), FLOAT
    )


def make_linear(spec: QuantSpec, rows: int = 32, columns: int = 64, bias: bool = True) -> QuantizedLinear:
    """Any codes, any zeros and scales of 16 bits: the format must hold them all."""
    generator = torch.Generator().manual_seed(0)
    weight = spec.weight
    groups = columns // (weight.group_size or columns)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(weight.qmin, weight.qmax + 1, shape, generator=generator, dtype=torch.int8)

    return QuantizedLinear(
        QuantizedTensor(
            codes(rows, columns),
            (torch.rand(rows, groups, generator=generator) + 0.1).to(torch.bfloat16).float(),
            None if weight.symmetric else codes(rows, groups),
            weight,
        ),
        spec,
        torch.randn(rows, generator=generator).to(torch.bfloat16) if bias else None,
    )


def plan(
    specs: Mapping[str, QuantSpec | None],
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    **more: Any,
) -> PlannedModel:
    """A planned model with these linears (None: float), 64 x 64 unless ``shapes`` says otherwise."""
    linears = {}
    for name in specs:
        rows, columns = (shapes or {}).get(name, (64, 64))
        unit = ".".join(name.split(".")[:3]) if name.count(".") > 2 else ""
        linears[name] = LinearInfo(name, name, unit, rows, columns, False, "bfloat16")
    chosen = {name: spec for name, spec in specs.items() if spec is not None}
    tensors = frozenset(f"{name}.weight" for name in specs)
    return PlannedModel(
        **{"config": {}, "dtype": "bfloat16", "linears": linears, "specs": chosen, "tensors": tensors, **more}
    )


@pytest.fixture
def scheme() -> Callable[..., QuantSpec]:
    """``spec_of``."""
    return spec_of


@pytest.fixture
def linear() -> Callable[..., QuantizedLinear]:
    """``make_linear``."""
    return make_linear


@pytest.fixture
def planned() -> Callable[..., PlannedModel]:
    """``plan``."""
    return plan
