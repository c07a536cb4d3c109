# SPDX-License-Identifier: Apache-2.0
"""From tensors and description back to modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelslim.api import ModelError, PlannedModel, QuantizedLinear, QuantSpec, TensorRecord, TensorSpec
from modelslim_ascendv1.saver import AscendV1Saver

NAME = "model.layers.0.mlp.down_proj"
DESCRIPTION = "quant_model_description.json"


def write(path: Path, modules: Mapping[str, QuantizedLinear], model_dtype: str) -> dict[str, Tensor]:
    """Store modules and one copied tensor; the description goes to the directory."""
    saver = AscendV1Saver()
    tensors = {"model.norm.weight": torch.ones(4)}
    records = [TensorRecord("model.norm.weight", None, 16)]
    for name, module in modules.items():
        for key, tensor in saver.encode(name, module, model_dtype):
            tensors[key] = tensor
            records.append(TensorRecord(key, module.spec, tensor.nbytes))
    model = PlannedModel({}, model_dtype, {}, {}, frozenset())
    for file, content in saver.finish(records, model).items():
        (path / file).write_text(json.dumps(content), encoding="utf-8")
    return tensors


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def in_float32(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(replace(spec.weight, scale_dtype="float32"), replace(spec.activation, scale_dtype="float32"))


def deq_scale(module: QuantizedLinear) -> Tensor:
    assert module.input_scale is not None
    return module.input_scale * module.scale


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """True when both are None, or equal in values and dtype."""
    if one is None or other is None:
        return one is other
    # By their bytes: float8 has no comparison.
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [NAME, "model.layers.0.mlp.up_proj"])
def test_decoded_module_is_the_encoded_one(
    spec: QuantSpec,
    model_dtype: str,
    bias: bool,
    name: str,
    linear: Callable[..., QuantizedLinear],
    tmp_path: Path,
) -> None:
    module = linear(spec, model_dtype, bias=bias)
    tensors = write(tmp_path, {name: module}, model_dtype)
    saved = AscendV1Saver.read_layout(tmp_path, shapes(tensors))

    assert saved.keys() == {name}
    assert set(saved[name].tensors) == tensors.keys() - {"model.norm.weight"}
    assert saved[name].spec.scheme == spec.scheme
    decoded = saved[name].decode({key: tensors[key] for key in saved[name].tensors})

    assert in_float32(decoded.spec) == in_float32(spec)
    assert torch.equal(decoded.codes.view(torch.uint8), module.codes.view(torch.uint8))
    if spec.is_static:
        assert torch.equal(deq_scale(decoded), deq_scale(module))
        assert torch.allclose(decoded.scale, module.scale, rtol=2**-22, atol=0)
    else:
        assert torch.equal(decoded.scale, module.scale)
    assert equal(decoded.input_scale, module.input_scale)
    assert equal(decoded.input_offset, module.input_offset)
    assert equal(decoded.offset, module.offset)
    held = module.bias if module.bias is None or spec.weight.is_float else module.bias.float()
    assert equal(decoded.bias, held)

    again = dict(AscendV1Saver().encode(name, decoded, model_dtype))
    assert all(equal(tensors[key], tensor) for key, tensor in again.items())
    assert again.keys() == set(saved[name].tensors)


@pytest.mark.parametrize("input_scale", [0.0231, 1.9999, 1.0, 1.3e-3, 0.5000001])
def test_deq_scale_survives_division_and_multiplication_to_the_bit(
    input_scale: float, specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear], tmp_path: Path
) -> None:
    module = linear(specs["static"], rows=20_000, columns=2, bias=False)
    module.scale.copy_(torch.exp(torch.randn(20_000, 1, generator=torch.Generator().manual_seed(5)) * 3))
    assert module.input_scale is not None
    module.input_scale.fill_(input_scale)
    tensors = write(tmp_path, {NAME: module}, "float16")
    decoded = AscendV1Saver.read_layout(tmp_path, shapes(tensors))[NAME].decode(tensors)
    assert torch.equal(deq_scale(decoded), deq_scale(module))


def test_row_of_zeros_with_a_bias_decodes_to_zeros(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear], tmp_path: Path
) -> None:
    module = linear(specs["static"])
    module.codes[3] = 0
    assert module.input_scale is not None
    module.input_scale.fill_(torch.finfo(torch.float32).tiny)
    module.scale.fill_(1e30)
    assert module.bias is not None
    module.bias[3] = 400
    tensors = write(tmp_path, {NAME: module}, "bfloat16")
    decoded = AscendV1Saver.read_layout(tmp_path, shapes(tensors))[NAME].decode(tensors)
    assert decoded(torch.zeros(1, 64))[0, 3] == 400


def test_several_linears_of_different_types_are_found(
    specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear], tmp_path: Path
) -> None:
    modules = {f"model.{index}.fc": linear(spec) for index, spec in enumerate(specs.values())}
    tensors = write(tmp_path, modules, "bfloat16")
    saved = AscendV1Saver.read_layout(tmp_path, shapes(tensors))
    assert {name: layout.spec.scheme for name, layout in saved.items()} == {
        name: module.spec.scheme for name, module in modules.items()
    }


@pytest.fixture
def stored(
    tmp_path: Path, specs: Mapping[str, QuantSpec], linear: Callable[..., QuantizedLinear]
) -> tuple[Path, dict[str, tuple[int, ...]]]:
    tensors = write(tmp_path, {NAME: linear(specs["static"]), "a.up_proj": linear(specs["w4a8"])}, "bfloat16")
    return tmp_path, shapes(tensors)


def edit(path: Path, **changes: str | None) -> None:
    file = path / DESCRIPTION
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


Stored = tuple[Path, dict[str, tuple[int, ...]]]


def refusal(stored: Stored) -> str:
    with pytest.raises(ModelError) as caught:
        AscendV1Saver.read_layout(*stored)
    assert caught.value.hint
    return str(caught.value)


def test_described_tensor_that_is_not_there_is_named(stored: Stored) -> None:
    del stored[1][f"{NAME}.deq_scale"]
    assert f"describes {NAME}.deq_scale that is in no weight file" in refusal(stored)


def test_tensor_that_is_not_described_is_named(stored: Stored) -> None:
    stored[1]["model.layers.9.extra"] = (4,)
    stored[1]["model.layers.8.extra"] = (4,)
    text = refusal(stored)
    assert "does not describe model.layers.8.extra (and 1 more tensors)" in text


def test_linear_without_one_of_its_tensors_is_refused(stored: Stored) -> None:
    edit(stored[0], **{f"{NAME}.quant_bias": None})
    del stored[1][f"{NAME}.quant_bias"]
    assert f"has no tensor {NAME}.quant_bias" in refusal(stored)


def test_tensor_of_another_type_than_its_linear_is_refused(stored: Stored) -> None:
    edit(stored[0], **{f"{NAME}.quant_bias": "FLOAT"})
    assert f"{NAME}.quant_bias is described as FLOAT" in refusal(stored)


def test_quantized_tensor_of_no_linear_is_refused(stored: Stored) -> None:
    edit(stored[0], **{"model.norm.weight_scale": "W8A8"})
    stored[1]["model.norm.weight_scale"] = (4, 1)
    assert "model.norm.weight_scale is described as W8A8 and belongs to no linear" in refusal(stored)


def test_unknown_type_is_refused_with_the_nearest(stored: Stored) -> None:
    edit(stored[0], **{f"{NAME}.weight": "W8A8_DYNAMICS"})
    assert "did you mean 'W8A8_DYNAMIC'?" in refusal(stored)


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (f"{NAME}.deq_scale", (23,)),
        (f"{NAME}.weight", (24, 64, 1)),
        ("a.up_proj.weight_scale", (24, 3)),
        ("a.up_proj.weight_scale", (24, 0)),
        ("a.up_proj.scale_bias", (24, 5)),
    ],
)
def test_wrong_shape_is_refused_and_named(tensor: str, shape: tuple[int, ...], stored: Stored) -> None:
    stored[1][tensor] = shape
    assert tensor in refusal(stored)


@pytest.mark.parametrize("content", ["{", "[]", '{"a.weight": 3}'])
def test_description_that_is_not_one_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(content, encoding="utf-8")
    assert DESCRIPTION in refusal((tmp_path, {}))


def test_directory_is_recognized_by_its_description(tmp_path: Path) -> None:
    assert not AscendV1Saver.recognizes(tmp_path)
    (tmp_path / DESCRIPTION).write_text("{}", encoding="utf-8")
    assert AscendV1Saver.recognizes(tmp_path)


def test_sparse_float_linear_keeps_its_dtype_and_gives_its_type_to_the_bias(
    linear: Callable[..., QuantizedLinear], tmp_path: Path
) -> None:
    module = linear(QuantSpec(TensorSpec("float", "per_channel", sparse=True)), "bfloat16")
    tensors = write(tmp_path, {"model.layers.0.mlp.up_proj": module}, "bfloat16")
    types = json.loads((tmp_path / "quant_model_description.json").read_text())
    for part in ("weight", "bias"):
        name = f"model.layers.0.mlp.up_proj.{part}"
        assert (tensors[name].dtype, types[name]) == (torch.bfloat16, "W16A16S")
    assert types["model_quant_type"] == "W16A16S"
