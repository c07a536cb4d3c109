# SPDX-License-Identifier: Apache-2.0
"""The adapter on tiny models of the family, in bfloat16 and float8, against transformers' own loader and MTP model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelslim.api import ModelError
from modelslim.checkpoint import Checkpoint
from modelslim.session import Session
from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim_deepseek.adapter import DeepSeekAdapter, DeepSeekV32Adapter

BLOCK = (16, 24)
CASES = [
    ("deepseek_v3", 1, True),
    ("deepseek_v3", 2, False),
    ("deepseek_v3", 0, False),
    ("deepseek_v2", 0, False),
    ("deepseek_v32", 1, True),
]
Stored = Callable[..., Path]


def adapter_of(path: Path) -> DeepSeekAdapter:
    model_type = json.loads((path / "config.json").read_text())["model_type"]
    return (DeepSeekV32Adapter if model_type == "deepseek_v32" else DeepSeekAdapter)(model_type, path)


def expand(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of every value of a weight."""
    rows, columns = (torch.arange(size) // edge for size, edge in zip(shape, BLOCK, strict=True))
    return scale[rows][:, columns]


@lru_cache
def dequantized(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint as floats: products in float64, which are exact, then rounded as in float32."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        codes, scale = tensors[name.removesuffix("_scale_inv")], tensors.pop(name)
        product = codes.to(torch.float64) * expand(scale, codes.shape).to(torch.float64)
        tensors[name.removesuffix("_scale_inv")] = product.to(torch.float32).to(torch.bfloat16)
    return tensors


@pytest.fixture(scope="session")
def as_float(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A checkpoint in bfloat16 that transformers itself can read."""

    @lru_cache
    def convert(source: Path) -> Path:
        path = tmp_path_factory.mktemp("float")
        config = json.loads((source / "config.json").read_text())
        config.pop("quantization_config", None)
        (path / "config.json").write_text(json.dumps(config))
        save_file(dict(dequantized(source)), path / "model.safetensors", metadata={"format": "pt"})
        return path

    return convert


@lru_cache(maxsize=2)
def reference(path: Path) -> Any:
    """The model as transformers itself loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def opened_whole(path: Path) -> OpenModel:
    """The model with every parameter loaded."""
    with Checkpoint(path) as checkpoint:
        found = OpenModel.of(adapter_of(path), checkpoint)
        found.fill()
    return found


class TestDeepSeek(AdapterContract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> tuple[str, int, bool]:
        return request.param  # type: ignore[no-any-return]

    @pytest.fixture
    def checkpoint(self, case: tuple[str, int, bool], stored: Stored) -> Path:
        return stored(*case)

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        return adapter_of(checkpoint)

    @pytest.fixture
    def samples(self) -> Sequence[Any]:
        return ("seven 7", "twelve chars", "x")

    @pytest.fixture(autouse=True)
    def find_reference(self, as_float: Callable[[Path], Path], checkpoint: Path) -> None:
        self.reference = reference(as_float(checkpoint))

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return self.reference(**inputs, use_cache=False).logits

    def test_parameters_and_buffers_are_those_of_from_pretrained(
        self, opened: OpenModel, case: tuple[str, int, bool]
    ) -> None:
        opened.fill()
        state = opened.model.state_dict() | dict(opened.model.named_buffers())
        expected = self.reference.state_dict() | dict(self.reference.named_buffers())
        # Fused experts are modules here and parameters there.
        actual = {name if name in expected else name.removesuffix(".weight"): name for name in state}
        mtp = {f"model.layers.{3 + index}" for index in range(case[1])}
        assert {".".join(name.split(".")[:3]) for name in actual.keys() - expected.keys()} == mtp
        for name, tensor in expected.items():
            assert (name, state[actual[name]].dtype) == (name, tensor.dtype)
            assert torch.equal(state[actual[name]], tensor), name

    def test_units_are_the_layers_and_then_those_of_mtp(self, case: tuple[str, int, bool], opened: OpenModel) -> None:
        assert [request.name for request in opened.visit] == [f"model.layers.{index}" for index in range(3 + case[1])]

    def test_every_stored_tensor_makes_a_parameter_or_repeats_one(self, opened: OpenModel) -> None:
        named = {key for source in opened.loader.sources.values() for key in source.keys}
        repeated = {name for name in opened.checkpoint.tensors if name.endswith(("embed_tokens.weight", "head.weight"))}
        assert named | repeated == opened.checkpoint.tensors.keys()
        assert repeated - named == {name for name in repeated if ".layers." in name}

    def test_tensors_of_the_checkpoint_are_floats(self, opened: OpenModel, checkpoint: Path) -> None:
        expected = dequantized(checkpoint)
        assert opened.checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            stored = opened.checkpoint.tensors[name]
            assert (name, stored.torch_dtype, stored.shape) == (name, tensor.dtype, tuple(tensor.shape))
            assert torch.equal(opened.checkpoint.read(name), tensor), name
            content = b"".join(bytes(piece) for piece in opened.checkpoint.chunks(name))
            assert torch.equal(torch.frombuffer(bytearray(content), dtype=tensor.dtype), tensor.flatten()), name


@pytest.mark.parametrize(("mtp_layers", "float8"), [(1, False), (1, True), (2, False)])
def test_mtp_layers_give_what_those_of_transformers_give(
    mtp_layers: int, float8: bool, stored: Stored, as_float: Callable[[Path], Path]
) -> None:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    path = stored("deepseek_v3", mtp_layers, float8)
    main = reference(as_float(path))
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34].*"]
    mtp = MtpModel.from_pretrained(main)
    ids = torch.tensor([[5, 9, 30, 7, 7, 21, 12]])
    expected: list[Tensor] = []
    found = opened_whole(path)
    model: Any = found.model
    with torch.no_grad():
        output = main(ids, output_hidden_states=True, use_cache=False)
        hidden, logits = output.hidden_states[-1], output.logits
        for layer in mtp.layers:
            layer.register_forward_hook(lambda _module, _args, output: expected.append(output))
        shifted = torch.cat((ids[:, 1:], logits[:, -1:].argmax(-1)), 1)
        mtp(shifted, hidden, None, torch.arange(1, 8)[None], MtpCache(config=main.config.get_mtp_config()))
        actual = adapter_of(path).run_mtp_layers(model, ids, hidden, logits)
    assert len(actual) == len(expected) == mtp_layers
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), (one - other).abs().max()


def test_mtp_layers_run_behind_the_main_model(stored: Stored) -> None:
    """Unit by unit with interleaved samples, the MTP layer gets what it gets when the sample runs alone."""
    path = stored("deepseek_v3", 1, False)
    whole = opened_whole(path)
    model: Any = whole.model
    samples = [{"input_ids": torch.tensor([[5, 9, 30, 7]])}, {"input_ids": torch.tensor([[6, 20, 11, 4, 33, 8]])}]
    with Checkpoint(path) as checkpoint, torch.no_grad():
        expected = []
        for sample in samples:
            hidden = model.model(**sample, use_cache=False).last_hidden_state
            expected += adapter_of(path).run_mtp_layers(model, sample["input_ids"], hidden, model.lm_head(hidden))
        opened = OpenModel.of(adapter_of(path), checkpoint)
        actual: list[Tensor] = []
        layer: Any = opened.model.get_submodule("model.layers.3")
        layer.shared_head["norm"].register_forward_hook(lambda _module, _args, output: actual.append(output))
        opened.run_units(samples)
    assert len(actual) == len(expected) == 2
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_tiny_model_that_proves_the_forward_has_mtp_layers(stored: Stored, tmp_path: Path) -> None:
    session = Session(adapter_of(stored("deepseek_v3", 2, True)))
    session.make_tiny_checkpoint(session.init_model("meta"), tmp_path)
    assert [request.name for request in opened_whole(tmp_path).visit] == [f"model.layers.{index}" for index in range(4)]


def test_router_bias_is_kept_in_float32(stored: Stored) -> None:
    path = stored("deepseek_v3", 1, True)
    state, tensors = opened_whole(path).model.state_dict(), load_file(path / "model.safetensors")
    for layer in (1, 2, 3):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert state[name].dtype == tensors[name].dtype == torch.float32
        assert torch.equal(state[name], tensors[name])
        assert not torch.equal(tensors[name].bfloat16().float(), tensors[name])


def test_number_of_mtp_layers_is_that_of_the_checkpoint(stored: Stored, tmp_path: Path) -> None:
    """The configuration counts them also where they were not saved, as by transformers."""
    shutil.copytree(stored("deepseek_v3", 0, False), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert len(opened_whole(tmp_path).visit) == 3


def test_float8_without_a_stated_dtype_becomes_bfloat16(stored: Stored, tmp_path: Path) -> None:
    shutil.copytree(stored("deepseek_v3", 1, True), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened_whole(tmp_path).model.state_dict()["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "awq"},
    ],
)
def test_other_quantized_sources_are_refused(quantization: Mapping[str, Any], stored: Stored, tmp_path: Path) -> None:
    shutil.copytree(stored("deepseek_v3", 0, False), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ModelError, match="quantized already"):
        adapter_of(tmp_path).init_model("meta")


def test_damaged_float8_codes_are_named(stored: Stored, tmp_path: Path) -> None:
    shutil.copytree(stored("deepseek_v3", 1, True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F  # the format's NaN
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds 1 value that is NaN"):
        opened_whole(tmp_path)


@pytest.mark.parametrize("change", ["absent", "shape", "orphan"])
def test_scales_that_do_not_fit_are_refused_before_anything_is_read(
    change: str, stored: Stored, tmp_path: Path
) -> None:
    shutil.copytree(stored("deepseek_v3", 1, True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    scale = tensors.pop(name)
    if change == "shape":
        tensors[name] = scale[:-1].clone()
    if change == "orphan":
        tensors[name] = scale
        tensors[name.removesuffix("_scale_inv")] = tensors[name.removesuffix("_scale_inv")].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match=name) as caught:
        adapter_of(tmp_path).get_decoded_tensors(checkpoint.stored)
    assert caught.value.hint
