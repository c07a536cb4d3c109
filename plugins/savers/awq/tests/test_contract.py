# SPDX-License-Identifier: Apache-2.0
"""The contract of savers, for every scheme of the format and some that it has not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from modelslim.api import FLOAT, QuantSpec, Saver, TensorSpec
from modelslim.testing.saver import Dequantize, SaverContract
from modelslim_awq.saver import AwqSaver


def weight(dtype: str, group_size: int | None = None, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(TensorSpec(dtype, "per_group" if group_size else "per_channel", symmetric, group_size), FLOAT)


SUPPORTED = {
    "symmetric": weight("int4"),
    "asymmetric": weight("int4", symmetric=False),
    "group": weight("int4", 32),
    "group-asymmetric": weight("int4", 128, symmetric=False),
}
REFUSED = {
    "W8A16": weight("int8"),
    "W4A8_DYNAMIC": QuantSpec(TensorSpec("int4", "per_channel"), TensorSpec("int8", "per_token")),
    "groups-of-256": weight("int4", 256),
    "float8": weight("fp8_e4m3"),
}


def nibbles(words: Tensor) -> Tensor:
    """int32 [any, out / 8] -> float64 [any, out]: outputs 0, 1, 2, ... lie at nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    shifts = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    return ((words.long().unsqueeze(-1) >> shifts) & 15).flatten(1).double()


def read_weight(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    """[out, in] in float64."""
    codes, zeros, scales = nibbles(tensors["qweight"]), nibbles(tensors["qzeros"]), tensors["scales"].double()
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).t()


class TestAwq(SaverContract):
    @pytest.fixture
    def saver(self) -> Saver:
        return AwqSaver()

    @pytest.fixture(params=SUPPORTED)
    def spec(self, request: pytest.FixtureRequest) -> QuantSpec:
        return SUPPORTED[request.param]

    @pytest.fixture(params=REFUSED)
    def refused(self, request: pytest.FixtureRequest) -> QuantSpec:
        return REFUSED[request.param]

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        return read_weight
