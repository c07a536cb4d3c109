# SPDX-License-Identifier: Apache-2.0
"""The contract of savers, for every scheme of the format and some that it has not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from modelslim.api import FLOAT, QuantSpec, Saver, TensorSpec
from modelslim.testing.saver import Dequantize, SaverContract
from modelslim_gptq.saver import GptqSaver


def weight(dtype: str, group_size: int | None = None, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(TensorSpec(dtype, "per_group" if group_size else "per_channel", symmetric, group_size), FLOAT)


SUPPORTED = {
    "W4A16": weight("int4"),
    "W4A16-asymmetric": weight("int4", symmetric=False),
    "W4A16-group": weight("int4", 32),
    "W4A16-group-asymmetric": weight("int4", 64, symmetric=False),
    "W8A16": weight("int8"),
    "W8A16-group-asymmetric": weight("int8", 128, symmetric=False),
    "W3A16-group": weight("int3", 32),
    "W3A16-asymmetric": weight("int3", symmetric=False),
    "W2A16-group-asymmetric": weight("int2", 16, symmetric=False),
}
REFUSED = {
    "W8A8_DYNAMIC": QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_token")),
    "W8A8": QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor")),
    "groups-of-8": weight("int4", 8),
    "float8": weight("fp8_e4m3"),
}


def bits_of(words: Tensor, bits: int) -> Tensor:
    """int32 [n, any] -> float64 [32 n / bits, any]: the numbers that each column spells, the lowest bit first."""
    single = (words.long().unsqueeze(1) >> torch.arange(32).view(-1, 1)) & 1
    numbers = single.flatten(0, 1).unflatten(0, (-1, bits))
    return (numbers << torch.arange(bits).view(-1, 1)).sum(1).double()


def read_weight(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    """[out, in] in float64; symmetric zeros are stored less one."""
    bits, group = spec.weight.bits, tensors["g_idx"].long()
    zeros = bits_of(tensors["qzeros"].t(), bits).t() + spec.weight.symmetric
    return ((bits_of(tensors["qweight"], bits) - zeros[group]) * tensors["scales"].double()[group]).t()


class TestGptq(SaverContract):
    @pytest.fixture
    def saver(self) -> Saver:
        return GptqSaver()

    @pytest.fixture(params=SUPPORTED)
    def spec(self, request: pytest.FixtureRequest) -> QuantSpec:
        return SUPPORTED[request.param]

    @pytest.fixture(params=REFUSED)
    def refused(self, request: pytest.FixtureRequest) -> QuantSpec:
        return REFUSED[request.param]

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        return read_weight
