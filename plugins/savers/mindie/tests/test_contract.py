# SPDX-License-Identifier: Apache-2.0
"""The contract of savers, for every scheme of the format and some that it has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modelslim.api import FLOAT, QuantSpec, Saver, TensorSpec
from modelslim.testing.saver import Dequantize, SaverContract
from modelslim_mindie.saver import MindieSaver

INT8 = TensorSpec("int8", "per_channel")
STATIC = TensorSpec("int8", "per_tensor")
DYNAMIC = TensorSpec("int8", "per_token")
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)

SUPPORTED = {
    "W8A8": QuantSpec(INT8, STATIC),
    "W8A8-asymmetric": QuantSpec(INT8, replace(STATIC, symmetric=False)),
    "W8A8_DYNAMIC": QuantSpec(INT8, DYNAMIC),
    "W8A8_MXFP8": QuantSpec(MXFP8, MXFP8),
    "W4A4_MXFP4": QuantSpec(MXFP4, MXFP4),
}
REFUSED = {
    "W8A16": QuantSpec(INT8, FLOAT),
    "W8A8_MIX": QuantSpec(INT8, replace(STATIC, scope="pd_mix")),
    "W8A8_DYNAMIC-asymmetric": QuantSpec(INT8, replace(DYNAMIC, symmetric=False)),
    "W8A8-group": QuantSpec(replace(INT8, scope="per_group", group_size=32), STATIC),
    "W8A8FP8_DYNAMIC": QuantSpec(replace(INT8, dtype="fp8_e4m3"), replace(DYNAMIC, dtype="fp8_e4m3")),
    "W4A8_DYNAMIC": QuantSpec(replace(INT8, dtype="int4"), DYNAMIC),
    "W4A4_DYNAMIC": QuantSpec(replace(INT8, dtype="int4"), replace(DYNAMIC, dtype="int4")),
    "W4A8_MXFP": QuantSpec(MXFP4, MXFP8),
    "W4A16_MXFP4": QuantSpec(MXFP4, FLOAT),
}


def read_weight(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    """[out, in] in float64."""
    codes = tensors["weight"]
    if spec.scheme == "W8A8":
        return codes.double() * (tensors["deq_scale"].double() / tensors["input_scale"].double()).view(-1, 1)
    scale = tensors["weight_scale"].double()
    if spec.scheme == "W8A8_DYNAMIC":
        return codes.double() * scale
    if spec.scheme == "W4A4_MXFP4":
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        codes = torch.cat((steps, -steps))[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()]
    return codes.double() * 2.0 ** (scale - 127).repeat_interleave(32, 1)


class TestMindie(SaverContract):
    @pytest.fixture
    def saver(self) -> Saver:
        return MindieSaver()

    @pytest.fixture(params=SUPPORTED)
    def spec(self, request: pytest.FixtureRequest) -> QuantSpec:
        return SUPPORTED[request.param]

    @pytest.fixture(params=REFUSED)
    def refused(self, request: pytest.FixtureRequest) -> QuantSpec:
        return REFUSED[request.param]

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        return read_weight
