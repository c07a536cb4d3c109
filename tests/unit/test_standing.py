# SPDX-License-Identifier: Apache-2.0
"""Quantized linears that stand in the model for a while compute what they compute elsewhere, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modelslim.api import FLOAT, QuantizedExperts, QuantizedLinear, QuantizedTensor, QuantSpec, TensorSpec
from modelslim.runners.standing import in_place

WEIGHT = TensorSpec("int4", "per_group", group_size=8)
SPECS = {
    "float": QuantSpec(WEIGHT, FLOAT),
    "dynamic": QuantSpec(WEIGHT, TensorSpec("int8", "per_token")),
}


def weight(*shape: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand((*shape[:-1], shape[-1] // 8), generator=generator)
    return QuantizedTensor(codes, scale, None, WEIGHT)


class Model(nn.Module):
    """Two places for linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_linear_computes_the_same(spec: str, multiplied: bool, dtype: torch.dtype) -> None:
    multiplier = torch.linspace(0.5, 2, 16) if multiplied else None
    made = QuantizedLinear(weight(16, 16), SPECS[spec], torch.ones(16), input_multiplier=multiplier)
    x = torch.randn((5, 16), generator=torch.Generator().manual_seed(1)).to(dtype)
    model = Model()
    up, down = model.up, model.down
    with torch.no_grad(), in_place(model, {"up": made}):
        assert torch.equal(model.up(x), made(x))
        assert model.down is down
    assert model.up is up


@pytest.mark.parametrize("spec", SPECS)
def test_experts_compute_the_same(spec: str) -> None:
    made = QuantizedExperts(weight(3, 16, 16), SPECS[spec], torch.ones(3, 16))
    x = torch.randn((7, 16), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    model = Model()
    with torch.no_grad(), in_place(model, {"down": made}):
        found = model.down(x, [4, 0, 2])
        assert torch.equal(found, made(x, [4, 0, 2]))
        assert not found[6:].any()


def test_weight_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    original = QuantizedTensor.dequantize
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self: decoded.append(self) or original(self))
    model = Model()
    x = torch.ones((5, 16), dtype=torch.bfloat16)
    with torch.no_grad(), in_place(model, {"up": QuantizedLinear(weight(16, 16), SPECS["float"])}):
        for _ in range(3):
            model.up(x)
    assert len(decoded) == 1
