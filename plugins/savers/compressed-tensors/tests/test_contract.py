# SPDX-License-Identifier: Apache-2.0
"""The contract of savers, for every scheme of the format and some that it has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from modelslim.api import FLOAT, QuantSpec, Saver, TensorSpec
from modelslim.testing.saver import Dequantize, SaverContract
from modelslim_compressed_tensors.arguments import arguments
from modelslim_compressed_tensors.formats import format_of
from modelslim_compressed_tensors.saver import CompressedTensorsSaver

INT8 = TensorSpec("int8", "per_channel")
INT4 = TensorSpec("int4", "per_channel")
STATIC = TensorSpec("int8", "per_tensor")
DYNAMIC = TensorSpec("int8", "per_token")
FP8 = TensorSpec("fp8_e4m3", "per_channel")

REFUSED = {
    "W8A8-asymmetric-weight": QuantSpec(replace(INT8, symmetric=False), STATIC),
    "W8A8_DYNAMIC-asymmetric-weight": QuantSpec(replace(INT8, symmetric=False), DYNAMIC),
    "W8A8-group": QuantSpec(replace(INT8, scope="per_group", group_size=32), STATIC),
    "W4A8": QuantSpec(INT4, STATIC),
    "W4A8_DYNAMIC-asymmetric": QuantSpec(INT4, replace(DYNAMIC, symmetric=False)),
    "W8A4_DYNAMIC": QuantSpec(INT8, replace(DYNAMIC, dtype="int4")),
    "W2A8_DYNAMIC": QuantSpec(replace(INT4, dtype="int2"), DYNAMIC),
    "W8A8FP8-asymmetric": QuantSpec(FP8, TensorSpec("fp8_e4m3", "per_tensor", symmetric=False)),
    "W4A8FP8": QuantSpec(INT4, TensorSpec("fp8_e4m3", "per_tensor")),
    "W4A8FP8-asymmetric-weight": QuantSpec(replace(INT4, symmetric=False), TensorSpec("fp8_e4m3", "per_token")),
    "W8A8FP8-int8": QuantSpec(FP8, DYNAMIC),
    "W8A8FP8-block-token": QuantSpec(
        TensorSpec("fp8_e4m3", "per_block", group_size=128, group_rows=128), TensorSpec("fp8_e4m3", "per_token")
    ),
    "W8A8FP8-block-64": QuantSpec(TensorSpec("fp8_e4m3", "per_block", group_size=64, group_rows=64), FLOAT),
    "W4A8_MXFP": QuantSpec(
        TensorSpec("mxfp4", "per_block", group_size=32), TensorSpec("mxfp8", "per_block", group_size=32)
    ),
    "W8A8_MIX": QuantSpec(INT8, TensorSpec("int8", "pd_mix")),
}


def read_by_the_package(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    word = format_of(spec).name
    inputs = None if spec.activation.is_float else arguments(spec.activation, inputs=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=arguments(spec.weight, inputs=False), input_activations=inputs, format=word
    )
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(word)
    weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight


class TestCompressedTensors(SaverContract):
    @pytest.fixture
    def saver(self) -> Saver:
        return CompressedTensorsSaver()

    @pytest.fixture
    def spec(self, scheme: str, specs: Mapping[str, QuantSpec]) -> QuantSpec:
        return specs[scheme]

    @pytest.fixture(params=REFUSED)
    def refused(self, request: pytest.FixtureRequest) -> QuantSpec:
        return REFUSED[request.param]

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        return read_by_the_package


def test_every_refusal_says_what_to_do_instead() -> None:
    from modelslim_compressed_tensors.schemes import refusals

    for spec in REFUSED.values():
        found = list(refusals(spec))
        assert found and all(refusal.what and refusal.hint for refusal in found), spec
    assert not list(refusals(QuantSpec(INT4, FLOAT)))
