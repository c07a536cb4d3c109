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
from modelslim_ascendv1.saver import AscendV1Saver

INT8 = TensorSpec("int8", "per_channel")
INT4 = TensorSpec("int4", "per_channel")
STATIC = TensorSpec("int8", "per_tensor")
DYNAMIC = TensorSpec("int8", "per_token")
FP8 = TensorSpec("fp8_e4m3", "per_channel")
MXFP8 = TensorSpec("mxfp8", "per_block", group_size=32)
MXFP4 = TensorSpec("mxfp4", "per_block", group_size=32)
NVFP4 = TensorSpec("nvfp4", "per_block", group_size=16)


def grouped(weight: TensorSpec, symmetric: bool = True) -> TensorSpec:
    return replace(weight, scope="per_group", group_size=32, symmetric=symmetric)


SUPPORTED = {
    "W8A8": QuantSpec(INT8, STATIC),
    "W8A8-asymmetric": QuantSpec(INT8, replace(STATIC, symmetric=False)),
    "W8A8_DYNAMIC": QuantSpec(INT8, DYNAMIC),
    "W8A16": QuantSpec(INT8, FLOAT),
    "W8A16-asymmetric": QuantSpec(replace(INT8, symmetric=False), FLOAT),
    "W8A16-group": QuantSpec(grouped(INT8), FLOAT),
    "W8A16-group-asymmetric": QuantSpec(grouped(INT8, symmetric=False), FLOAT),
    "W4A8_DYNAMIC": QuantSpec(INT4, DYNAMIC),
    "W4A16": QuantSpec(INT4, FLOAT),
    "W4A16-asymmetric": QuantSpec(replace(INT4, symmetric=False), FLOAT),
    "W4A16-group": QuantSpec(grouped(INT4), FLOAT),
    "W4A16-group-asymmetric": QuantSpec(grouped(INT4, symmetric=False), FLOAT),
    "W8A8_MIX": QuantSpec(INT8, TensorSpec("int8", "pd_mix", symmetric=False)),
    "W4A4_DYNAMIC": QuantSpec(INT4, TensorSpec("int4", "per_token")),
    "W8A8FP8_DYNAMIC": QuantSpec(FP8, TensorSpec("fp8_e4m3", "per_token")),
    "W8A8_MXFP8": QuantSpec(MXFP8, MXFP8),
    "W4A8_MXFP": QuantSpec(MXFP4, MXFP8),
    "W4A4_MXFP4": QuantSpec(MXFP4, MXFP4),
    "W4A16_MXFP4": QuantSpec(MXFP4, FLOAT),
}
REFUSED = {
    "W8A8-asymmetric-weight": QuantSpec(replace(INT8, symmetric=False), STATIC),
    "W8A8-group": QuantSpec(grouped(INT8), STATIC),
    "W8A8_DYNAMIC-asymmetric": QuantSpec(INT8, replace(DYNAMIC, symmetric=False)),
    "W4A8": QuantSpec(INT4, STATIC),
    "W4A8_DYNAMIC-group": QuantSpec(grouped(INT4), DYNAMIC),
    "W8A4_DYNAMIC": QuantSpec(INT8, replace(DYNAMIC, dtype="int4")),
    "W3A16-group": QuantSpec(grouped(replace(INT4, dtype="int3")), FLOAT),
    "W2A16": QuantSpec(replace(INT4, dtype="int2"), FLOAT),
    "W8A8FP8": QuantSpec(FP8, TensorSpec("fp8_e4m3", "per_tensor")),
    "W8A4_MXFP": QuantSpec(MXFP8, MXFP4),
    "W4A4_NVFP4": QuantSpec(NVFP4, NVFP4),
}


def read_weight(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    """[out, in] in float64."""
    scheme = spec.scheme
    if scheme == "W8A8":
        scale = tensors["deq_scale"]
        scale = scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale
        return tensors["weight"].double() * (scale.double() / tensors["input_scale"].double()).view(-1, 1)
    scale = tensors["weight_scale"].double()
    if "MXFP" in scheme:
        scale = 2.0 ** (scale - 127)
    if scheme == "W4A16":
        shifts = torch.arange(0, 32, 4)
        codes = (((tensors["weight_packed"].long().unsqueeze(-1) >> shifts) & 15) - 8).flatten(1).double()
    elif scheme == "W4A8_DYNAMIC":
        bytes_ = tensors["weight"].long() & 255
        codes = torch.stack((bytes_ & 15, bytes_ >> 4), 1).flatten(0, 1).double()
        codes = torch.where(codes > 7, codes - 16, codes)
    elif "MXFP4" in scheme or scheme == "W4A8_MXFP":
        steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        bytes_ = tensors["weight"].long()
        codes = torch.cat((steps, -steps))[torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)]
    else:
        codes = tensors["weight"].double()
    offset = tensors.get("weight_offset", torch.zeros(1, 1)).double()
    groups = codes.unflatten(1, (scale.shape[1], -1))
    return ((groups + offset.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


class TestAscendV1(SaverContract):
    @pytest.fixture
    def saver(self) -> Saver:
        return AscendV1Saver()

    @pytest.fixture(params=SUPPORTED)
    def spec(self, request: pytest.FixtureRequest) -> QuantSpec:
        return SUPPORTED[request.param]

    @pytest.fixture(params=REFUSED)
    def refused(self, request: pytest.FixtureRequest) -> QuantSpec:
        return REFUSED[request.param]

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        return read_weight
