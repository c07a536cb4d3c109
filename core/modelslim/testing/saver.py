# SPDX-License-Identifier: Apache-2.0
"""What the writer and the readers of checkpoints expect of every saver.

Give the contract a saver, the schemes that its format has, some that it has not, and a decoder of your own, written
from the description of the format and not from the saver::

    from modelslim.testing.saver import SaverContract

    class TestMySaver(SaverContract):
        @pytest.fixture
        def saver(self):
            return MySaver()

        @pytest.fixture(params=[QuantSpec(TensorSpec("int8", "per_channel"), FLOAT)])
        def spec(self, request):
            return request.param

        @pytest.fixture(params=[QuantSpec(TensorSpec("int4", "per_channel"), FLOAT)])
        def refused(self, request):
            return request.param

        @pytest.fixture
        def dequantize(self):
            return lambda tensors, spec: tensors["weight"].double() * tensors["weight_scale"].double()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, byte_view
from modelslim.engine_rules import check_model, choose_target
from modelslim.errors import SaveError
from modelslim.quantized import QuantizedLinear
from modelslim.registry import Registry
from modelslim.saver import PlannedModel, Saver, TensorRecord
from modelslim.scales import range_to_scale, whole_scale
from modelslim.testing.rounding import round_to_nearest
from modelslim.types import LinearInfo, Problem, QuantSpec
from modelslim.writer import ShardWriter

ROWS, COLUMNS = 128, 256
COPIED = "model.norm.weight"


Dequantize = Callable[[Mapping[str, Tensor], QuantSpec], Tensor]
"""Makes a weight, floating [out, in], from the tensors of a linear, by the rest of their names, and its spec."""


class SaverContract:
    """Subclass it; supply ``saver``, ``dequantize``, and ``spec`` and ``refused`` with ``params``."""

    @pytest.fixture
    def saver(self) -> Saver:
        """An instance of the saver."""
        raise NotImplementedError("supply the fixture `saver`: an instance of your saver")

    @pytest.fixture
    def spec(self) -> QuantSpec:
        """A scheme that the format has."""
        raise NotImplementedError("supply the fixture `spec` with params: the schemes that the format has")

    @pytest.fixture
    def refused(self) -> QuantSpec:
        """A scheme that the format has not."""
        raise NotImplementedError("supply the fixture `refused` with params: schemes that the format has not")

    @pytest.fixture
    def dequantize(self) -> Dequantize:
        """A decoder that shares nothing with the saver: the package of the format, or a few lines of arithmetic."""
        raise NotImplementedError("supply the fixture `dequantize`: a decoder of your own, see modelslim.testing.saver")

    @pytest.fixture(params=["bfloat16", "float16", "float32"])
    def model_dtype(self, request: pytest.FixtureRequest) -> str:
        """Dtype of the model; override it where the format takes fewer."""
        return str(request.param)

    @pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
    def module(
        self, saver: Saver, spec: QuantSpec, model_dtype: str, request: pytest.FixtureRequest
    ) -> QuantizedLinear:
        """A linear of that scheme, with scales in the dtypes that the saver asks for."""
        return random_linear(saver, spec, model_dtype, bias=request.param)

    @pytest.fixture
    def name(self) -> str:
        """Name of the linear; override it with one that the engine treats like any other."""
        return "model.layers.0.mlp.down_proj"

    def test_module_is_left_alone(self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str) -> None:
        """``encode`` only reads."""
        before = deepcopy(module.state_dict())
        list(saver.encode(name, module, model_dtype))
        assert_same_bytes(module.state_dict(), before)

    def test_encoding_again_gives_the_same_bytes(
        self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str
    ) -> None:
        """A run that is resumed must give the same files."""
        once = dict(saver.encode(name, module, model_dtype))
        assert_same_bytes(dict(saver.encode(name, deepcopy(module), model_dtype)), once)

    def test_planned_sizes_are_those_of_the_tensors(
        self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str
    ) -> None:
        """The plan promises names and sizes from which the disk space is computed."""
        tensors = list(saver.encode(name, module, model_dtype))
        sizes = {key: tensor.nbytes for key, tensor in tensors}
        assert len(sizes) == len(tensors), "a name comes twice"
        assert saver.encoded_sizes(_info(name, module, model_dtype), module.spec, model_dtype) == sizes

    def test_scheme_is_accepted(self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str) -> None:
        """``check`` refuses nothing that ``spec`` claims."""
        problems = saver.check(_planned(name, module, model_dtype))
        assert [problem.message for problem in problems if problem.fatal] == []

    def test_scheme_that_the_format_has_not_is_refused(
        self, saver: Saver, refused: QuantSpec, name: str, model_dtype: str
    ) -> None:
        """By ``check``, before a weight is read, naming the linear."""
        module = random_linear(saver, refused, model_dtype)
        problems = [problem for problem in saver.check(_planned(name, module, model_dtype)) if problem.fatal]
        assert problems
        assert any(name in (problem.linear or "") or name in problem.message for problem in problems)

    def test_saved_linear_decodes_to_the_module(
        self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str, tmp_path: Path
    ) -> None:
        """Files and tensors alone give back a module that computes the same and is stored as the same bytes."""
        assert not saver.recognizes(tmp_path)
        tensors = dict(saver.encode(name, module, model_dtype))
        _write_files(saver, tensors, name, module, model_dtype, tmp_path)
        assert saver.recognizes(tmp_path)
        shapes = {COPIED: (COLUMNS,), **{key: tuple(tensor.shape) for key, tensor in tensors.items()}}
        saved = saver.read_layout(tmp_path, shapes)
        assert saved.keys() == {name}
        assert set(saved[name].tensors) == tensors.keys()
        assert saved[name].spec.scheme == module.spec.scheme

        decoded = saved[name].decode({key: tensors[key] for key in saved[name].tensors})
        assert decoded.spec.scheme == module.spec.scheme
        assert torch.equal(_bytes(decoded.codes), _bytes(module.codes))
        # A format may store a product of scales, whose factors come back within rounding.
        torch.testing.assert_close(decoded.weight.dequantize(), module.weight.dequantize(), rtol=1e-6, atol=0)
        assert_same_bytes(dict(saver.encode(name, decoded, model_dtype)), tensors)
        x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(decoded(x), module(x), rtol=1e-5, atol=1e-5)

    def test_decoder_that_is_not_the_savers_reads_the_weight(
        self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str, dequantize: Dequantize
    ) -> None:
        """A saver that misreads the format reads its own files back without a fault."""
        tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in saver.encode(name, module, model_dtype)}
        found = dequantize(tensors, module.spec)
        expected = module.weight.dequantize().to(found.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    def test_killed_run_leaves_nothing_that_looks_complete(
        self,
        saver: Saver,
        module: QuantizedLinear,
        name: str,
        model_dtype: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The saver writes no file, and weights alone are no checkpoint of the format."""
        monkeypatch.chdir(tmp_path)
        stem = saver.weights_name(_planned(name, module, model_dtype))
        shards = ShardWriter(tmp_path, stem, saver.max_shard_bytes, 1 << 14, lambda *_: None)
        try:
            for key, tensor in saver.encode(name, module, model_dtype):
                data = byte_view(tensor.contiguous())
                shards.add(key, DTYPE_NAMES[tensor.dtype], tensor.shape, len(data), [data])
            assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".unfinished")] == []
            assert not saver.recognizes(tmp_path)
            shards.finish()
        finally:
            shards.abandon()
        assert not saver.recognizes(tmp_path)

    def test_multiplier_of_the_input_comes_back(
        self, saver: Saver, module: QuantizedLinear, name: str, model_dtype: str, tmp_path: Path
    ) -> None:
        """As planned, and with all else of the linear; a format that has no place for it refuses to lose it."""
        module.input_multiplier = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) + 0.1
        if not saver.stores_multipliers:
            with pytest.raises(SaveError):
                list(saver.encode(name, module, model_dtype))
            return
        tensors = dict(saver.encode(name, module, model_dtype))
        info = replace(_info(name, module, model_dtype), has_multiplier=True)
        sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
        assert saver.encoded_sizes(info, module.spec, model_dtype) == sizes
        _write_files(saver, tensors, name, module, model_dtype, tmp_path)
        shapes = {COPIED: (COLUMNS,), **{key: tuple(tensor.shape) for key, tensor in tensors.items()}}
        saved = saver.read_layout(tmp_path, shapes)
        assert saved.keys() == {name}
        assert set(saved[name].tensors) == tensors.keys()
        decoded = saved[name].decode({key: tensors[key] for key in saved[name].tensors})
        assert decoded.input_multiplier is not None
        torch.testing.assert_close(decoded.input_multiplier, module.input_multiplier, rtol=1e-6, atol=0)
        x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(decoded(x), module(x), rtol=1e-5, atol=1e-5)


def planned_problems(saver: Saver, name: str, model: PlannedModel) -> list[Problem]:
    """What a plan says of a model: what the saver cannot write, and what the engine that it writes for does not load.

    Args:
        saver: the saver.
        name: its entry's name.
        model: the planned model.
    """
    return check_model(saver, name, choose_target(None, 1, saver, Registry.scan()), model)


def random_linear(saver: Saver, spec: QuantSpec, model_dtype: str, *, bias: bool = True) -> QuantizedLinear:
    """A linear of 128 outputs and 256 inputs with random weights, rounded to nearest."""
    weight_dtype, activation_dtype = saver.scale_dtypes(spec, model_dtype)
    spec = QuantSpec(
        replace(spec.weight, scale_dtype=weight_dtype), replace(spec.activation, scale_dtype=activation_dtype)
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.1
    if spec.weight.is_float:
        weight = torch.where(weight.abs() > 0.03, weight, 0.0).to(getattr(torch, model_dtype))
    input_scale = input_offset = None
    if spec.activation.dtype == "nvfp4":
        input_scale, input_offset = whole_scale(torch.tensor([3.0])), torch.zeros(1, dtype=torch.int8)
    elif spec.is_static:
        input_scale, input_offset = range_to_scale(torch.tensor([-2.0]), torch.tensor([3.0]), spec.activation)
        input_offset = torch.zeros(1, dtype=torch.int8) if input_offset is None else input_offset
    return QuantizedLinear(
        round_to_nearest(weight, spec.weight),
        spec,
        torch.randn(ROWS, generator=generator).to(getattr(torch, model_dtype)) if bias else None,
        input_scale,
        input_offset,
    )


def assert_same_bytes(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless both hold the same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (key, actual[key].dtype, actual[key].shape) == (key, tensor.dtype, tensor.shape)
        assert torch.equal(_bytes(actual[key]), _bytes(tensor)), key


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _info(name: str, module: QuantizedLinear, model_dtype: str) -> LinearInfo:
    return LinearInfo(name, name, "model.layers.0", ROWS, COLUMNS, module.bias is not None, model_dtype)


def _planned(name: str, module: QuantizedLinear, model_dtype: str) -> PlannedModel:
    """A model whose only linear is this one."""
    bias = () if module.bias is None else (f"{name}.bias",)
    return PlannedModel(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        model_dtype,
        {name: _info(name, module, model_dtype)},
        {name: module.spec},
        frozenset({COPIED, f"{name}.weight", *bias}),
    )


def _write_files(
    saver: Saver, tensors: Mapping[str, Tensor], name: str, module: QuantizedLinear, model_dtype: str, path: Path
) -> None:
    """What lies beside the weights: the format's JSON files and config.json."""
    model = _planned(name, module, model_dtype)
    records = [
        TensorRecord(COPIED, None, 4 * COLUMNS),
        *(TensorRecord(key, module.spec, tensor.nbytes) for key, tensor in tensors.items()),
    ]
    config = saver.edit_config(dict(model.config), records, model)
    files = {"config.json": config, **saver.finish(records, model)}
    for file, content in files.items():
        (path / file).write_text(json.dumps(content), encoding="utf-8")
