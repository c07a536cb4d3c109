# SPDX-License-Identifier: Apache-2.0
"""Quantized linears made with a few lines of torch, and planned models, for all tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from modelslim.api import (
    FLOAT,
    LinearInfo,
    PlannedModel,
    QuantizedLinear,
    QuantizedTensor,
    QuantSpec,
    TensorSpec,
    to_codes,
)

STATIC = TensorSpec("int8", "per_tensor")
TOKEN = TensorSpec("int8", "per_token")
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)

# Every scheme that the format has, under a name for the test's id.
SPECS: Mapping[str, QuantSpec] = {
    "static": QuantSpec(TensorSpec("int8", "per_channel"), STATIC),
    "static-asymmetric": QuantSpec(
        TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor", symmetric=False)
    ),
    "dynamic": QuantSpec(TensorSpec("int8", "per_channel"), TOKEN),
    "w8a16": QuantSpec(TensorSpec("int8", "per_channel"), FLOAT),
    "w8a16-asymmetric": QuantSpec(TensorSpec("int8", "per_channel", symmetric=False), FLOAT),
    "w8a16-group": QuantSpec(TensorSpec("int8", "per_group", group_size=16), FLOAT),
    "w8a16-group-asymmetric": QuantSpec(TensorSpec("int8", "per_group", symmetric=False, group_size=16), FLOAT),
    "w4a8": QuantSpec(TensorSpec("int4", "per_channel"), TOKEN),
    "w4a16": QuantSpec(TensorSpec("int4", "per_channel"), FLOAT),
    "w4a16-asymmetric": QuantSpec(TensorSpec("int4", "per_channel", symmetric=False), FLOAT),
    "w4a16-group": QuantSpec(TensorSpec("int4", "per_group", group_size=16), FLOAT),
    "w4a16-group-asymmetric": QuantSpec(TensorSpec("int4", "per_group", symmetric=False, group_size=16), FLOAT),
    "w8a8-mix": QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "pd_mix", symmetric=False)),
    "w4a4": QuantSpec(TensorSpec("int4", "per_channel"), TensorSpec("int4", "per_token")),
    "fp8": QuantSpec(TensorSpec("fp8_e4m3", "per_channel"), TensorSpec("fp8_e4m3", "per_token")),
    "mxfp8": QuantSpec(MXFP8, MXFP8),
    "mxfp4": QuantSpec(MXFP4, MXFP4),
    "w4a8-mxfp": QuantSpec(MXFP4, MXFP8),
    "w4a16-mxfp4": QuantSpec(MXFP4, FLOAT),
    "w16a16s": QuantSpec(TensorSpec("float", "per_channel", sparse=True), FLOAT),
    "w8a8s": QuantSpec(TensorSpec("int8", "per_channel", sparse=True), STATIC),
}
DTYPES = ("bfloat16", "float16", "float32")


def make_linear(
    spec: QuantSpec, model_dtype: str = "bfloat16", rows: int = 24, columns: int = 64, bias: bool = True, seed: int = 0
) -> QuantizedLinear:
    """A linear with random weights whose scales are exact in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, model_dtype)
    spec_w = spec.weight
    weight = torch.randn(rows, columns, generator=generator) * 0.1 + (0 if spec_w.symmetric else 0.05)
    groups = weight.view(rows, -1, spec_w.group_size or columns)
    offset = None
    if spec_w.is_float:
        scale = torch.ones(rows, 1)
        codes = torch.where(weight.abs() > 0.03, weight, 0.0).to(dtype)
    elif not spec_w.is_integer:
        # A power of two is exact in any dtype.
        scale = torch.exp2((groups.abs().amax(-1) / (256 if spec_w.bits == 8 else 4)).log2().floor())
        codes = to_codes(groups / scale.unsqueeze(-1), spec_w)
    elif spec_w.symmetric:
        scale = (groups.abs().amax(-1) / spec_w.qmax).to(dtype).float()
        codes = (groups / scale.unsqueeze(-1)).round()
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / (spec_w.qmax - spec_w.qmin)).to(dtype).float()
        offset = (spec_w.qmin - (low / scale).round()).clamp(spec_w.qmin, spec_w.qmax).to(torch.int8)
        codes = (groups / scale.unsqueeze(-1)).round() + offset.unsqueeze(-1)
    if spec_w.is_integer:
        codes = codes.clamp(spec_w.qmin, spec_w.qmax).to(torch.int8)
    codes = codes.view(rows, columns)
    static = spec.is_static
    return QuantizedLinear(
        QuantizedTensor(codes, scale, offset, spec_w),
        spec,
        torch.randn(rows, generator=generator).to(dtype) if bias else None,
        torch.tensor([0.0231]).to(dtype).float() if static else None,
        torch.tensor([0 if spec.activation.symmetric else -37], dtype=torch.int8) if static else None,
    )


def plan(
    specs: Mapping[str, QuantSpec | None],
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    tensors: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> PlannedModel:
    """A planned model with these linears (None: float), 64 x 64 unless ``shapes`` says otherwise."""
    linears = {}
    for name in specs:
        rows, columns = (shapes or {}).get(name, (64, 64))
        linears[name] = LinearInfo(name, name, name.rpartition(".")[0], rows, columns, False, dtype)
    return PlannedModel(
        config or {},
        dtype,
        linears,
        {name: spec for name, spec in specs.items() if spec is not None},
        frozenset({*tensors, *(f"{name}.weight" for name in specs)}),
    )


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    """Each scheme that the format has."""
    return SPECS[request.param]


@pytest.fixture(params=DTYPES)
def model_dtype(request: pytest.FixtureRequest) -> str:
    """Each dtype of a model."""
    return str(request.param)


@pytest.fixture
def specs() -> Mapping[str, QuantSpec]:
    """All schemes by name."""
    return SPECS


@pytest.fixture
def linear() -> Callable[..., QuantizedLinear]:
    """``make_linear``."""
    return make_linear


@pytest.fixture
def planned() -> Callable[..., PlannedModel]:
    """``plan``."""
    return plan
