# SPDX-License-Identifier: Apache-2.0
"""Tensors are those that the compressed-tensors package itself writes, and it reads them back exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from modelslim.api import QuantizedLinear, QuantSpec, SaveError, TensorSpec
from modelslim.testing.saver import random_linear
from modelslim_compressed_tensors.arguments import arguments
from modelslim_compressed_tensors.formats import format_of
from modelslim_compressed_tensors.saver import CompressedTensorsSaver
from modelslim_compressed_tensors.scales import HELD

SAVER = CompressedTensorsSaver()
NAME = "model.layers.0.mlp.down_proj"


def encode(module: QuantizedLinear, model_dtype: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{NAME}."): tensor for key, tensor in SAVER.encode(NAME, module, model_dtype)}


def package(spec: QuantSpec) -> tuple[type[BaseCompressor], QuantizationScheme]:
    inputs = None if spec.activation.is_float else arguments(spec.activation, inputs=True)
    word = format_of(spec).name
    scheme = QuantizationScheme(
        targets=["Linear"], weights=arguments(spec.weight, inputs=False), input_activations=inputs, format=word
    )
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(word)
    # For int4 with float8 inputs the package would choose codes that are not packed, which vLLM does not read.
    packed_by_us = spec.weight.is_integer and spec.activation.dtype == "fp8_e4m3"
    assert compressor.can_compress(torch.nn.Linear, scheme) != packed_by_us
    return compressor, scheme


def raw(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float16", "float32"])
def test_the_package_reads_the_weight_of_the_module(
    scheme: str, specs: Mapping[str, QuantSpec], model_dtype: str
) -> None:
    module = random_linear(SAVER, specs[scheme], model_dtype)
    compressor, described = package(specs[scheme])
    found = compressor.decompress(encode(module, model_dtype), described)["weight"]
    # Weights whose scales have a type of their own are bfloat16 whatever the model is.
    held = format_of(specs[scheme]).scales is HELD
    assert found.dtype == (getattr(torch, model_dtype) if held else torch.bfloat16)
    assert torch.equal(found, module.weight.dequantize().to(found.dtype))


def test_the_package_writes_the_same_tensors(scheme: str, specs: Mapping[str, QuantSpec]) -> None:
    module = random_linear(SAVER, specs[scheme], "float32")
    tensors = encode(module, "float32")
    scale = module.scale
    state = {"weight": module.weight.dequantize(), "bias": module.bias, "weight_zero_point": module.offset}
    if module.whole_scale is not None:
        state["weight_global_scale"] = 1 / module.whole_scale
        scale = (scale / module.whole_scale).to(torch.float8_e4m3fn).float()
    if module.input_scale is not None and specs[scheme].activation.dtype == "nvfp4":
        state["input_global_scale"] = 1 / module.input_scale
    elif module.input_scale is not None:
        state |= {"input_scale": module.input_scale, "input_zero_point": module.input_offset}
    given = {key: tensor for key, tensor in {**state, "weight_scale": scale}.items() if tensor is not None}
    compressor, theirs = package(specs[scheme])
    expected = compressor.compress(given, theirs)
    assert described(tensors) == described(expected)
    assert [key for key, tensor in tensors.items() if not torch.equal(raw(tensor), raw(expected[key]))] == []


@pytest.mark.parametrize("columns", [8, 20, 100])
def test_rows_that_do_not_fill_their_last_word(columns: int, specs: Mapping[str, QuantSpec]) -> None:
    for name in ("w4a16-asymmetric", "w3a16", "w8a16-asymmetric"):
        whole = random_linear(SAVER, specs[name], "bfloat16")
        offset = None if whole.offset is None else whole.offset[:21]
        weight = replace(whole.weight, codes=whole.codes[:21, :columns], scale=whole.scale[:21], offset=offset)
        module = QuantizedLinear(weight, whole.spec)
        compressor, scheme = package(specs[name])
        found = compressor.decompress(encode(module, "bfloat16"), scheme)["weight"]
        assert torch.equal(found, module.weight.dequantize().to(torch.bfloat16)), name


def test_zero_points_of_symmetric_schemes_are_not_written(scheme: str, specs: Mapping[str, QuantSpec]) -> None:
    spec = specs[scheme]
    parts = encode(random_linear(SAVER, spec, "bfloat16"), "bfloat16").keys()
    assert ("weight_zero_point" in parts) == (not spec.weight.symmetric)
    assert ("input_zero_point" in parts) == (spec.is_static and not spec.activation.symmetric)


def test_what_the_format_does_not_have_is_refused_by_name(specs: Mapping[str, QuantSpec]) -> None:
    spec = QuantSpec(TensorSpec("int4", "per_channel"), TensorSpec("int8", "per_tensor"))
    module = random_linear(SAVER, spec, "bfloat16")
    with pytest.raises(SaveError, match=f"{NAME}: .*int4 weights with static int8 activations"):
        encode(module, "bfloat16")
    plain = random_linear(SAVER, specs["w4a16"], "bfloat16")
    multiplied = QuantizedLinear(plain.weight, plain.spec, input_multiplier=torch.ones(plain.in_features))
    with pytest.raises(SaveError, match=f"{NAME}: .*multiplier"):
        encode(multiplied, "bfloat16")
