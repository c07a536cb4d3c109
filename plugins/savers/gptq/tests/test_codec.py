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
from modelslim_gptq.saver import GptqSaver

NAME = "model.layers.0.mlp.down_proj"
Array = NDArray[np.float64]
Linear = Callable[..., QuantizedLinear]
Scheme = Callable[..., QuantSpec]


def store(module: QuantizedLinear, model_dtype: str = "bfloat16") -> dict[str, Tensor]:
    return {key.removeprefix(f"{NAME}."): tensor for key, tensor in GptqSaver().encode(NAME, module, model_dtype)}


def fields(words: Tensor, bits: int) -> list[int]:
    """The numbers of so many bits that a row of words spells, the lowest first."""
    assert words.dtype == torch.int32
    number = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(number >> (bits * place)) & ((1 << bits) - 1) for place in range(len(words) * 32 // bits)]


def read_weight(tensors: Mapping[str, Tensor], bits: int, version: int) -> Array:
    """[out, in] in float64; version 1 holds zeros less one, version 2 as they are."""
    codes = np.array([fields(column, bits) for column in tensors["qweight"].t()], np.float64)
    zeros = np.array([fields(row, bits) for row in tensors["qzeros"]], np.float64).T + (2 - version)
    group = tensors["g_idx"].numpy()
    assert group.dtype == np.int32
    scales = tensors["scales"].to(torch.float64).numpy().T
    return (codes - zeros[:, group]) * scales[:, group]


def wanted(module: QuantizedLinear) -> Array:
    """(code - offset) * scale in float64."""
    scale = module.scale.to(torch.float64).numpy()
    offset = np.zeros_like(scale) if module.offset is None else module.offset.numpy().astype(np.float64)
    codes = module.codes.numpy().astype(np.float64).reshape(*scale.shape, -1)
    return ((codes - offset[..., None]) * scale[..., None]).reshape(module.codes.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_tensors_give_the_weight(
    bits: int, group_size: int | None, symmetric: bool, linear: Linear, scheme: Scheme
) -> None:
    module = linear(scheme(bits, group_size, symmetric))
    weight = read_weight(store(module), bits, version=1 if symmetric else 2)
    np.testing.assert_array_equal(weight, wanted(module))


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_kernels_that_take_half_the_range_for_zero_give_the_weight(
    bits: int, linear: Linear, scheme: Scheme
) -> None:
    module = linear(scheme(bits, 32))
    tensors = store(module)
    codes = np.array([fields(column, bits) for column in tensors["qweight"].t()], np.float64)
    scales = tensors["scales"].to(torch.float64).numpy().T.repeat(32, axis=1)
    np.testing.assert_array_equal((codes - 2 ** (bits - 1)) * scales, wanted(module))


def test_symmetric_zeros_are_stored_less_one(linear: Linear, scheme: Scheme) -> None:
    assert (store(linear(scheme(4, 32)))["qzeros"] == 0x77777777).all()
    assert (store(linear(scheme(8, 32)))["qzeros"] == 0x7F7F7F7F).all()


def test_dtypes_and_shapes(linear: Linear, scheme: Scheme) -> None:
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in store(linear(scheme(4, 16))).items()}
    assert found == {
        "qweight": (torch.int32, (8, 32)),
        "qzeros": (torch.int32, (4, 4)),
        "scales": (torch.bfloat16, (4, 32)),
        "g_idx": (torch.int32, (64,)),
        "bias": (torch.bfloat16, (32,)),
    }
    assert store(linear(scheme(4, 16), bias=False)).keys() == found.keys() - {"bias"}
    assert store(linear(scheme(4)), "float32")["scales"].dtype == torch.float16


def test_what_the_format_cannot_hold_is_not_stored(linear: Linear, scheme: Scheme) -> None:
    multiplied = linear(scheme(4))
    multiplied.input_multiplier = torch.ones(64)
    with pytest.raises(SaveError, match="multiplied"):
        store(multiplied)
    static = linear(scheme(4))
    static.spec = QuantSpec(scheme(4).weight, TensorSpec("int8", "per_token"))
    with pytest.raises(SaveError, match="int8 activations"):
        store(static)


@pytest.fixture
def checkpoint(tmp_path: Path, linear: Linear, scheme: Scheme) -> tuple[Path, dict[str, Tensor], QuantizedLinear]:
    """A directory with config.json, its tensors, and the linear that they hold."""
    module = linear(scheme(4, 32, symmetric=False))
    tensors = dict(GptqSaver().encode(NAME, module, "bfloat16"))
    records = [TensorRecord(key, module.spec, tensor.nbytes) for key, tensor in tensors.items()]
    model = PlannedModel({}, "bfloat16", {}, {}, frozenset())
    config = GptqSaver().edit_config({"model_type": "llama"}, records, model)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path, tensors, module


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def decode(path: Path, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    saved = GptqSaver.read_layout(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
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


def test_zeros_of_version_1_are_those_stored_and_one(checkpoint: Stored) -> None:
    path, tensors, module = checkpoint
    edit(path, checkpoint_format="gptq")
    decoded = decode(path, tensors)
    assert decoded.offset is not None
    assert module.offset is not None
    assert torch.equal((decoded.offset.int() + 8) % 16, (module.offset.int() + 9) % 16)


def test_zeros_that_contradict_sym_are_refused(checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    edit(path, sym=True)
    with pytest.raises(ModelError, match=r"qzeros is not 8 everywhere"):
        decode(path, tensors)


def test_groups_that_are_not_neighbours_are_refused(checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    with pytest.raises(ModelError, match=r"g_idx does not give neighbouring inputs"):
        decode(path, tensors)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
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
        ({"bits": 5}, "bits 5"),
        ({"group_size": "all"}, "group_size 'all'"),
        ({"group_size": 48}, "groups of 48 do not divide"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"dynamic": {r"-:^lm_head$": {}, r"+:.*\.down_proj": {"bits": 8}}}, "another scheme for"),
    ],
)
def test_config_that_is_not_read_here_is_refused(change: dict[str, object], words: str, checkpoint: Stored) -> None:
    path, tensors, _ = checkpoint
    edit(path, **change)
    with pytest.raises(ModelError, match=words) as caught:
        decode(path, tensors)
    assert caught.value.hint


def test_only_its_own_checkpoints_are_recognized(checkpoint: Stored, tmp_path: Path) -> None:
    assert GptqSaver.recognizes(checkpoint[0])
    edit(checkpoint[0], quant_method="awq")
    assert not GptqSaver.recognizes(checkpoint[0])
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        GptqSaver.recognizes(tmp_path)
