# SPDX-License-Identifier: Apache-2.0
"""The stored tensors, read back by a decoder written here from the description of the format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelslim.api import ModelError, PlannedModel, QuantizedLinear, QuantSpec, SaveError, TensorRecord, TensorSpec
from modelslim_awq.saver import AwqSaver

NAME = "model.layers.0.mlp.down_proj"
Array = NDArray[np.float64]
Linear = Callable[..., QuantizedLinear]
Scheme = Callable[..., QuantSpec]


def store(module: QuantizedLinear, model_dtype: str = "bfloat16") -> dict[str, Tensor]:
    return {key.removeprefix(f"{NAME}."): tensor for key, tensor in AwqSaver().encode(NAME, module, model_dtype)}


def unpack(packed: Tensor) -> Array:
    """int32 [n, out / 8] -> [n, out]: output 0, 1, 2, ... of eight lies at nibble 0, 4, 1, 5, 2, 6, 3, 7."""
    assert packed.dtype == torch.int32
    values = np.zeros((packed.shape[0], packed.shape[1] * 8))
    for row in range(packed.shape[0]):
        for output in range(values.shape[1]):
            nibble = (0, 4, 1, 5, 2, 6, 3, 7)[output % 8]
            values[row, output] = (int(packed[row, output // 8]) >> (4 * nibble)) & 15
    return values


def read_weight(tensors: Mapping[str, Tensor]) -> Array:
    """[out, in] in float64: (q - z) * s."""
    codes, zeros = unpack(tensors["qweight"]), unpack(tensors["qzeros"])
    size = codes.shape[0] // zeros.shape[0]
    scales = tensors["scales"].to(torch.float64).numpy()
    return ((codes - zeros.repeat(size, axis=0)) * scales.repeat(size, axis=0)).T


def wanted(module: QuantizedLinear) -> Array:
    """(code - offset) * scale in float64."""
    scale = module.scale.to(torch.float64).numpy()
    offset = np.zeros_like(scale) if module.offset is None else module.offset.numpy().astype(np.float64)
    codes = module.codes.numpy().astype(np.float64).reshape(*scale.shape, -1)
    return ((codes - offset[..., None]) * scale[..., None]).reshape(module.codes.shape)


@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_tensors_give_the_weight(
    group_size: int | None, symmetric: bool, linear: Linear, scheme: Scheme
) -> None:
    module = linear(scheme(4, group_size, symmetric))
    np.testing.assert_array_equal(read_weight(store(module)), wanted(module))


def test_eight_outputs_lie_in_a_word_in_the_order_of_the_kernels(linear: Linear, scheme: Scheme) -> None:
    module = linear(scheme(4), rows=8, columns=16)
    module.codes.copy_((torch.arange(8, dtype=torch.int8) - 8).view(8, 1).expand(8, 16))
    assert [f"{int(word) & 0xFFFFFFFF:08x}" for word in store(module)["qweight"].view(-1)] == ["75316420"] * 16


def test_zero_of_symmetric_weights_is_8(linear: Linear, scheme: Scheme) -> None:
    assert (store(linear(scheme(4, 32)))["qzeros"].view(torch.uint8) == 0x88).all()


def test_dtypes_and_shapes(linear: Linear, scheme: Scheme) -> None:
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in store(linear(scheme(4, 16))).items()}
    assert found == {
        "qweight": (torch.int32, (64, 4)),
        "qzeros": (torch.int32, (4, 4)),
        "scales": (torch.bfloat16, (4, 32)),
        "bias": (torch.bfloat16, (32,)),
    }
    assert store(linear(scheme(4, 16), bias=False)).keys() == found.keys() - {"bias"}
    assert store(linear(scheme(4)), "float32")["scales"].dtype == torch.float16


def test_what_the_format_cannot_hold_is_not_stored(linear: Linear, scheme: Scheme) -> None:
    multiplied = linear(scheme(4))
    multiplied.input_multiplier = torch.ones(64)
    with pytest.raises(SaveError, match="multiplied"):
        store(multiplied)
    dynamic = linear(scheme(4))
    dynamic.spec = QuantSpec(scheme(4).weight, TensorSpec("int8", "per_token"))
    with pytest.raises(SaveError, match="int8 activations"):
        store(dynamic)


@pytest.fixture
def checkpoint(tmp_path: Path, linear: Linear, scheme: Scheme) -> tuple[Path, dict[str, Tensor], QuantizedLinear]:
    """A directory with config.json, its tensors, and the linear that they hold."""
    module = linear(scheme(4, 32, symmetric=False))
    tensors = dict(AwqSaver().encode(NAME, module, "bfloat16"))
    records = [TensorRecord(key, module.spec, tensor.nbytes) for key, tensor in tensors.items()]
    model = PlannedModel({}, "bfloat16", {}, {}, frozenset())
    config = AwqSaver().edit_config({"model_type": "llama"}, records, model)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path, tensors, module


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def decode(path: Path, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    saved = AwqSaver.read_layout(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return saved[NAME].decode(tensors)


Stored = tuple[Path, dict[str, Tensor], QuantizedLinear]


def test_decoded_linear_is_the_stored_one(checkpoint: Stored) -> None:
    path, tensors, module = checkpoint
    decoded = decode(path, tensors)
    assert torch.equal(decoded.codes, module.codes)
    assert torch.equal(decoded.scale, module.scale)
    assert decoded.offset is not None
    assert module.offset is not None
    assert torch.equal(decoded.offset, module.offset)
    assert (decoded.spec.weight.scope, decoded.spec.weight.group_size) == ("per_group", 32)


def test_weight_whose_zeros_are_all_8_is_symmetric(checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    tensors[f"{NAME}.qzeros"].view(torch.uint8).fill_(0x88)
    decoded = decode(path, tensors)
    assert decoded.offset is None
    assert decoded.spec.weight.symmetric


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_or_misshapen_tensor_is_named(part: str, checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    tensor = tensors.pop(f"{NAME}.{part}")
    with pytest.raises(ModelError, match=rf"no tensor {NAME}\.{part}"):
        decode(path, tensors)
    tensors[f"{NAME}.{part}"] = tensor[:1]
    with pytest.raises(ModelError, match=rf"{NAME}\.{part} has shape"):
        decode(path, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 8}, "bits 8"),
        ({"group_size": "all"}, "group_size 'all'"),
        ({"group_size": 48}, "groups of 48 do not divide"),
        ({"version": "gemv"}, "version 'gemv'"),
        ({"zero_point": False}, "no zero points"),
    ],
)
def test_config_that_is_not_read_here_is_refused(change: dict[str, object], words: str, checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    edit(path, **change)
    with pytest.raises(ModelError, match=words) as caught:
        decode(path, tensors)
    assert caught.value.hint


def test_only_its_own_checkpoints_are_recognized(checkpoint: Stored, tmp_path: Path) -> None:
    assert AwqSaver.recognizes(checkpoint[0])
    edit(checkpoint[0], quant_method="gptq")
    assert not AwqSaver.recognizes(checkpoint[0])
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        AwqSaver.recognizes(tmp_path)
