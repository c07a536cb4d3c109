# SPDX-License-Identifier: Apache-2.0
"""The stored tensors, read back by a decoder written here from the description of the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelslim.api import LinearInfo, QuantizedLinear, QuantizedTensor, QuantSpec, SaveError, TensorSpec
from modelslim_ascendv1.int4 import pack_rows, unpack_rows
from modelslim_ascendv1.saver import AscendV1Saver

Array = NDArray[np.float64]
NAME = "model.layers.0.mlp.experts.0.up_proj"


def store(module: QuantizedLinear, model_dtype: str, name: str = NAME) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in AscendV1Saver().encode(name, module, model_dtype)}


def wide(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy()


def signed(nibble: int) -> int:
    return nibble - 16 if nibble > 7 else nibble


def read_codes(tensors: Mapping[str, Tensor], scheme: str) -> NDArray[np.int64]:
    """The integers of a weight, one nibble at a time where two or eight share a byte or a word."""
    if scheme == "W4A16":
        words = tensors["weight_packed"].numpy()
        assert words.dtype == np.int32
        rows, columns = (int(size) for size in tensors["weight_shape"])
        codes = np.zeros((rows, columns), np.int64)
        for row in range(rows):
            for column in range(columns):
                codes[row, column] = ((int(words[row, column // 8]) >> (4 * (column % 8))) & 15) - 8
        return codes
    stored = tensors["weight"].view(torch.uint8).numpy() if "MXFP" in scheme else tensors["weight"].numpy()
    assert stored.dtype == (np.uint8 if "MXFP" in scheme else np.int8)
    if scheme != "W4A8_DYNAMIC":
        return stored.astype(np.int64)
    codes = np.zeros((stored.shape[0] * 2, stored.shape[1]), np.int64)
    for row in range(stored.shape[0]):
        for column in range(stored.shape[1]):
            byte = int(stored[row, column]) & 255
            codes[2 * row, column] = signed(byte & 15)
            codes[2 * row + 1, column] = signed(byte >> 4)
    return codes


def read_deq_scale(stored: Tensor) -> Array:
    if stored.dtype == torch.int64:
        assert int(stored.min()) >= 0
        assert int(stored.max()) < 2**32
        return stored.numpy().astype(np.uint32).view(np.float32).astype(np.float64)
    assert stored.dtype == torch.float32
    return wide(stored)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(byte: int) -> float:
    """A float8 number from its bits."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if byte & 128 else size


FLOAT8 = np.array([e4m3(byte) for byte in range(256)])
FLOAT4 = np.array([*E2M1, *(-value for value in E2M1)])


def read_floats(stored: Tensor, scheme: str) -> Array:
    """The floating numbers of a weight."""
    data = stored.view(torch.uint8).numpy()
    if scheme.startswith("W4"):
        assert stored.dtype == torch.uint8
        return np.asarray(FLOAT4[np.stack((data & 15, data >> 4), -1).reshape(len(data), -1)])
    assert stored.dtype == torch.float8_e4m3fn
    return np.asarray(FLOAT8[data])


def read_weight(tensors: Mapping[str, Tensor], scheme: str) -> Array:
    """The weight as the engine sees it, with the offset added to the codes before they are scaled."""
    if "MXFP" in scheme:
        stored = tensors["weight_scale"]
        assert stored.dtype == torch.uint8
        scale = 2.0 ** (wide(stored) - 127)
        values = read_floats(tensors["weight"], scheme)
        return np.asarray((values.reshape(*scale.shape, 32) * scale[..., None]).reshape(values.shape))
    if scheme == "W16A16S":
        return wide(tensors["weight"])
    if "FP8" in scheme:
        assert not tensors["weight_offset"].any()
        return np.asarray(read_floats(tensors["weight"], scheme) * wide(tensors["weight_scale"]))
    codes = read_codes(tensors, scheme)
    scale = wide(tensors["weight_scale"])
    rows, groups = scale.shape
    offset = wide(tensors["weight_offset"]) if "weight_offset" in tensors else np.zeros_like(scale)
    return ((codes.reshape(rows, groups, -1) + offset[..., None]) * scale[..., None]).reshape(rows, -1)


def float_inputs(x: Array, spec: TensorSpec) -> Array:
    """Inputs on the nearest number of a floating type, of two the even one, scaled per token or per block of 32."""
    table = FLOAT8[:127] if spec.bits == 8 else FLOAT4[:8]
    blocks = x.reshape(len(x), -1, spec.group_size or x.shape[1])
    largest = np.abs(blocks).max(2, keepdims=True)
    if spec.dtype == "fp8_e4m3":
        scale = (largest.astype(np.float32) / np.float32(448)).astype(np.float64)
    else:
        exponent = np.floor(np.log2(largest))
        if spec.bits == 4:
            exponent += largest / 2**exponent >= 1.75
        scale = 2.0 ** (exponent - (8 if spec.bits == 8 else 2))
    exact = (blocks.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    distance = np.abs(np.abs(exact)[..., None] - table) + 1e-12 * (np.arange(len(table)) % 2)
    return np.asarray((np.sign(exact) * table[distance.argmin(-1)] * scale).reshape(x.shape))


def engine_forward(tensors: Mapping[str, Tensor], spec: QuantSpec, x: Array) -> Array:
    bias = wide(tensors["bias"]) if "bias" in tensors else 0.0
    if spec.scheme in ("W8A8", "W8A8S") or (spec.scheme == "W8A8_MIX" and len(x) == 1):
        # The bias tensor is loaded by the engine and not added: quant_bias holds it.
        quantized = np.rint(x / wide(tensors["input_scale"]) + wide(tensors["input_offset"])).clip(-128, 127)
        sums = quantized @ read_codes(tensors, "W8A8").T.astype(np.float64) + wide(tensors["quant_bias"])
        return np.asarray(read_deq_scale(tensors["deq_scale"]) * sums)
    weight = read_weight(tensors, spec.scheme)
    if not spec.activation.is_integer and not spec.activation.is_float:
        x = float_inputs(x, spec.activation)
    elif not spec.activation.is_float:
        # In float32, as engines do it, since a quotient beside a half would round to another code.
        top = spec.activation.qmax
        scale = (np.abs(x).max(1, keepdims=True).astype(np.float32) / np.float32(top)).astype(np.float32)
        x = np.rint(x.astype(np.float32) / scale).clip(-top - 1, top).astype(np.float64) * scale.astype(np.float64)
    return np.asarray(x @ weight.T + bias)


@pytest.mark.parametrize("bias", [True, False])
def test_engine_computes_from_the_tensors_what_the_module_computes(
    spec: QuantSpec, model_dtype: str, bias: bool, linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(spec, model_dtype, bias=bias)
    tensors = store(module, model_dtype)
    # A module that leaves its input float multiplies in the dtype of its input.
    dtype = getattr(torch, model_dtype) if spec.activation.is_float else torch.float32
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)

    expected = engine_forward(tensors, spec, wide(x))
    actual = wide(module(x))

    rounding = torch.finfo(dtype).eps * 8 * np.abs(expected).max()
    if spec.scheme in ("W8A8", "W8A8S"):  # quant_bias is the bias to the nearest integer
        rounding = rounding + 0.5001 * read_deq_scale(tensors["deq_scale"])
    assert (np.abs(actual - expected) <= rounding).all()


def test_weight_read_from_the_tensors_is_the_weight_of_the_module(
    spec: QuantSpec, model_dtype: str, linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(spec, model_dtype)
    tensors = store(module, model_dtype)
    if module.input_scale is not None:
        assert (read_codes(tensors, "W8A8") == module.codes.numpy()).all()
        assert (read_deq_scale(tensors["deq_scale"]) == (module.input_scale * module.scale).view(-1).numpy()).all()
    else:
        weight = read_weight(tensors, spec.scheme).astype(np.float32)
        assert (weight == module.weight.dequantize().numpy()).all()


def test_encoded_sizes_are_those_of_the_encoded_tensors(
    spec: QuantSpec, model_dtype: str, linear: Callable[..., QuantizedLinear]
) -> None:
    for name in ("a.up_proj", "a.down_proj"):
        for bias in (True, False):
            info = LinearInfo(f"model.{name}", name, "model", 24, 64, bias, model_dtype)
            module = linear(spec, model_dtype, bias=bias)
            encoded = {
                key: tensor.numel() * tensor.element_size()
                for key, tensor in AscendV1Saver().encode(name, module, model_dtype)
            }
            assert AscendV1Saver().encoded_sizes(info, spec, model_dtype) == encoded


def test_encode_leaves_the_module_alone_and_yields_contiguous_cpu_tensors(
    spec: QuantSpec, linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(spec)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for tensor in store(module, "bfloat16").values():
        assert tensor.is_contiguous()
    assert all(
        torch.equal(before[name].view(torch.uint8), buffer.view(torch.uint8)) for name, buffer in module.named_buffers()
    )


def test_every_tensor_has_the_dtype_and_shape_of_the_format(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    def found(scheme: str, dtype: str = "bfloat16") -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {part: (t.dtype, tuple(t.shape)) for part, t in store(linear(specs[scheme], dtype), dtype).items()}

    bias = (torch.float32, (24,))
    scales = (torch.float32, (24, 1))
    assert found("static") == {
        "weight": (torch.int8, (24, 64)),
        "quant_bias": (torch.int32, (24,)),
        "input_scale": (torch.float32, (1,)),
        "input_offset": (torch.float32, (1,)),
        "deq_scale": (torch.float32, (24,)),
        "bias": bias,
    }
    assert found("static", "float16")["deq_scale"] == (torch.int64, (24,))
    assert found("static", "float32")["deq_scale"] == (torch.int64, (24,))
    assert found("dynamic") == {
        "weight": (torch.int8, (24, 64)),
        "weight_scale": scales,
        "weight_offset": scales,
        "bias": bias,
    }
    assert found("w8a16") == found("dynamic")
    assert found("w8a16-group")["weight_offset"] == (torch.float32, (24, 4))
    assert found("w4a8") == {
        "weight": (torch.int8, (12, 64)),
        "weight_scale": scales,
        "weight_offset": scales,
        "scale_bias": scales,
        "bias": bias,
    }
    assert found("w4a16-group") == {
        "weight_packed": (torch.int32, (24, 8)),
        "weight_scale": (torch.bfloat16, (24, 4)),
        "weight_shape": (torch.int32, (2,)),
        "bias": bias,
    }
    assert found("w4a16-group-asymmetric", "float16")["weight_offset"] == (torch.float16, (24, 4))


def test_asymmetric_weight_offset_is_stored_negated(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    for scheme in ("w8a16-asymmetric", "w4a16-group-asymmetric"):
        module = linear(specs[scheme])
        assert module.offset is not None
        assert module.offset.any()
        assert torch.equal(store(module, "bfloat16")["weight_offset"].float(), -module.offset.float())


@pytest.mark.parametrize(("name", "slices"), [("a.experts.3.up_proj", 1), ("a.experts.3.down_proj", 16), ("a.w2", 16)])
def test_scale_bias_is_eight_times_the_sum_of_each_slice_of_the_weight(
    name: str, slices: int, specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(specs["w4a8"], rows=600, columns=128)
    stored = store(module, "bfloat16", name)["scale_bias"]
    assert stored.shape == (600, slices)
    weight = wide(module.weight.dequantize())
    width = 128 // slices
    for row in range(600):
        for part in range(slices):
            expected = 8 * weight[row, part * width : (part + 1) * width].sum()
            assert float(stored[row, part]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_quant_bias_is_computed_without_losing_integers(linear: Callable[..., QuantizedLinear]) -> None:
    spec = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor", symmetric=False))
    codes = torch.full((2, 40_000), 127, dtype=torch.int8)
    codes[1, 0] = 126
    scale = torch.tensor([[1.0], [1.0]])
    module = QuantizedLinear(
        QuantizedTensor(codes, scale, None, spec.weight),
        spec,
        torch.tensor([3.0, -3.0]),
        torch.tensor([1.0]),
        torch.tensor([-127], dtype=torch.int8),
    )
    # 127 * 127 * 40000 needs more bits than float32 has.
    assert store(module, "bfloat16")["quant_bias"].tolist() == [645_160_003, 645_159_870]


def test_bias_of_a_row_of_zeros_is_kept_to_the_bit(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(specs["static-asymmetric"])
    module.codes[3:5] = 0
    module.scale[3:5] = torch.finfo(torch.float32).tiny
    assert module.bias is not None
    module.bias[4] = 0
    tensors = store(module, "bfloat16")
    y = engine_forward(tensors, module.spec, np.ones((1, 64)))
    assert y[0, 3] == float(module.bias[3])
    assert y[0, 4] == 0


def test_bias_that_does_not_fit_into_32_bits_is_refused_with_a_remedy(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> None:
    module = linear(specs["static"])
    module.scale[7] = 1e-9
    with pytest.raises(SaveError) as caught:
        store(module, "bfloat16")
    assert NAME in str(caught.value)
    assert "first row 7" in str(caught.value)
    assert "W8A8_DYNAMIC" in caught.value.hint


def test_bias_that_would_overflow_the_engines_sum_is_refused(linear: Callable[..., QuantizedLinear]) -> None:
    spec = QuantSpec(TensorSpec("int8", "per_channel"), TensorSpec("int8", "per_tensor"))
    weight = QuantizedTensor(torch.full((1, 1024), 127, dtype=torch.int8), torch.ones(1, 1), None, spec.weight)
    for bias, fits in ((2.0**31 - 2**25, True), (2.0**31 - 2**20, False)):
        module = QuantizedLinear(weight, spec, torch.tensor([bias]), torch.ones(1), torch.zeros(1, dtype=torch.int8))
        if fits:
            assert store(module, "bfloat16")["quant_bias"].tolist() == [int(bias)]
        else:
            with pytest.raises(SaveError):
                store(module, "bfloat16")


def test_scheme_without_a_type_is_not_written(linear: Callable[..., QuantizedLinear]) -> None:
    spec = QuantSpec(TensorSpec("int8", "per_group", group_size=16), TensorSpec("int8", "per_token"))
    with pytest.raises(SaveError, match="int8 per_group weights with int8 activations"):
        store(linear(spec), "bfloat16")
    with pytest.raises(SaveError, match="int8 per_group weights with int8 activations"):
        AscendV1Saver().encoded_sizes(LinearInfo("a", "a", "", 24, 64, False, "bfloat16"), spec, "bfloat16")


def test_rows_of_more_than_a_block_are_packed_in_pairs() -> None:
    codes = torch.randint(-8, 8, (130, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    nibbles = codes.int() & 15
    assert torch.equal(pack_rows(codes).int() & 255, nibbles[::2] | nibbles[1::2] << 4)
    assert torch.equal(unpack_rows(pack_rows(codes)), codes)


def test_w8a8s_stores_deq_scale_as_its_bits_also_for_bfloat16(linear: Callable[..., QuantizedLinear]) -> None:
    spec = QuantSpec(TensorSpec("int8", "per_channel", sparse=True), TensorSpec("int8", "per_tensor"))
    tensors = store(linear(spec, "bfloat16", bias=False), "bfloat16")
    assert tensors.keys() == {"weight", "quant_bias", "input_scale", "input_offset", "deq_scale"}
    assert tensors["deq_scale"].dtype == torch.int64
    assert read_deq_scale(tensors["deq_scale"]).max() < 1
