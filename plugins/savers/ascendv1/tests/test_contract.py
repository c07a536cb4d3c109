# SPDX-License-Identifier: Apache-2.0
"""The contract of savers, for every scheme of the format and some that it has not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelslim.api import FLOAT, QuantSpec, Saver, TensorSpec
from modelslim.testing.saver import SaverContract
from modelslim_ascendv1.saver import AscendV1Saver

INT8 = TensorSpec("int8", "per_channel")
INT4 = TensorSpec("int4", "per_channel")
STATIC = TensorSpec("int8", "per_tensor")
DYNAMIC = TensorSpec("int8", "per_token")


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
}
REFUSED = {
    "W8A8-asymmetric-weight": QuantSpec(replace(INT8, symmetric=False), STATIC),
    "W8A8-group": QuantSpec(grouped(INT8), STATIC),
    "W8A8_DYNAMIC-asymmetric": QuantSpec(INT8, replace(DYNAMIC, symmetric=False)),
    "W4A8": QuantSpec(INT4, STATIC),
    "W4A8_DYNAMIC-group": QuantSpec(grouped(INT4), DYNAMIC),
    "W8A4_DYNAMIC": QuantSpec(INT8, replace(DYNAMIC, dtype="int4")),
}


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
