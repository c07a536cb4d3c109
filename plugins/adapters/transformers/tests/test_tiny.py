# SPDX-License-Identifier: Apache-2.0
"""A published size becomes a tiny model of the same kinds of layers, on which a wrong forward shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelslim.api import CapabilityError, ProcessRequest, hookimpl
from modelslim.guard import Guard
from modelslim.session import Session
from modelslim_transformers.adapter import TransformersAdapter
from modelslim_transformers.tiny import count_layers
from modelslim_transformers.tiny_config import shrink

LAYERS = {
    "llama": 2,
    "mistral": 2,
    "mixtral": 2,
    "phi3": 2,
    "qwen3_moe": 2,
    "gemma2": 2,  # every second layer sees a window
    "gemma3_text": 6,  # every sixth layer sees all
    "gpt_oss": 2,
    "qwen3_next": 4,  # every fourth layer has attention
    "deepseek_v3": 4,  # the first three are dense
    "llama4_text": 4,  # every fourth layer has no rotation
    "smollm3": 4,
    "qwen2_5_vl": 2,
    "qwen3_vl": 2,
    "qwen3_vl_moe": 2,
    "internvl": 2,
    "llava": 2,
    "gemma3": 6,
}
"""How many of the first layers of the default size hold one of each kind."""

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 10000.0}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "phi3": {"rope_parameters": {**LONG, "original_max_position_embeddings": 4096}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_vl": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [24, 20, 20]}}},
}
"""What the published checkpoints say beyond the defaults."""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """``write("llama")``: directory that holds the config.json of the default size, and nothing else."""

    def make(model_type: str, **settings: Any) -> Path:
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[model_type](**{**SETTINGS.get(model_type, {}), **settings})
        config.architectures, config.dtype = ["Any"], torch.bfloat16
        config.save_pretrained(tmp_path)
        return tmp_path

    return make


def guard(adapter: type[TransformersAdapter], path: Path) -> list[str]:
    session = Session(adapter("any", path))
    reopen = lambda model_type, tiny: Session(adapter(model_type, tiny))  # noqa: E731
    return Guard("acme", reopen).check(session, session.init_model("meta"))


@pytest.mark.parametrize("model_type", LAYERS)
def test_model_of_published_size_is_proven_on_every_kind_of_its_layers(model_type: str, write: Any) -> None:
    path = write(model_type)
    adapter = TransformersAdapter(model_type, path)
    _, layers = adapter.language_layers(Session(adapter).init_model("meta"))
    assert count_layers(layers, adapter.config.get_text_config()) == LAYERS[model_type]
    assert guard(TransformersAdapter, path) == []


@pytest.mark.parametrize("model_type", LAYERS)
def test_tiny_configuration_differs_in_sizes_and_special_tokens_only(model_type: str, write: Any) -> None:
    config = TransformersAdapter(model_type, write(model_type)).config
    values, tiny = config.to_dict(), shrink(config.to_dict(), 2)
    assert tiny.keys() == values.keys()
    for path, old, new in changed(values, tiny):
        assert isinstance(new, int) and not isinstance(new, bool), (path, old, new)


def changed(values: Any, tiny: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Every leaf that is not the same, lists that were cut to the layers compared as far as they go."""
    if isinstance(values, Mapping):
        return [found for key in values for found in changed(values[key], tiny[key], f"{path}.{key}")]
    if isinstance(values, list) and isinstance(tiny, list):
        pairs = zip(values, tiny, strict=False)
        return [found for old, new in pairs for found in changed(old, new, path)]
    return [] if values == tiny else [(path, values, tiny)]


class Replaying(TransformersAdapter):
    """Hands every layer what the first one got, as was right for the models of some years ago."""

    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        own = super().generate_model_forward(model, inputs)
        request = next(own)
        kwargs = request.kwargs
        try:
            while True:
                output = yield ProcessRequest(request.name, request.module, request.args, kwargs)
                request = own.send(output)
        except StopIteration as end:
            return end.value


class Skipping(TransformersAdapter):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        own = super().generate_model_forward(model, inputs)
        request = next(own)
        try:
            while True:
                if request.name.endswith(".1"):
                    request = own.send(request.module(*request.args, **request.kwargs))
                request = own.send((yield request))
        except StopIteration as end:
            return end.value


class Forgetful(TransformersAdapter):
    @hookimpl
    def generate_model_forward(self, model: Any, inputs: Any) -> Any:
        own = super().generate_model_forward(model, inputs)
        request = next(own)
        try:
            while True:
                output = yield request
                output = output - request.args[0] if request.name.endswith(".0") else output
                request = own.send(output)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize(
    ("model_type", "unit"),
    [
        ("gemma3_text", "model.layers.5"),
        ("gpt_oss", "model.layers.1"),
        ("gemma2", "model.layers.1"),
        ("llama4_text", "model.layers.3"),
    ],
)
def test_replay_of_the_first_layers_arguments_is_refused(model_type: str, unit: str, write: Any) -> None:
    with pytest.raises(CapabilityError, match=f"the first unit that differs is {unit}: .* attention_mask") as caught:
        guard(Replaying, write(model_type))
    assert "on a tiny random model" in caught.value.message


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3_moe", "qwen3_next"]
)  # unpadded, both kinds of its layers get no mask
def test_replay_where_all_layers_take_the_same_is_right(model_type: str, write: Any) -> None:
    assert guard(Replaying, write(model_type)) == []


def test_unit_that_is_computed_behind_the_engines_back_is_refused(write: Any) -> None:
    with pytest.raises(CapabilityError, match=r"it fails in model\.layers\.1: "):  # which is not resident then
        guard(Skipping, write("llama"))


def test_residual_that_is_forgotten_is_refused(write: Any) -> None:
    with pytest.raises(CapabilityError, match=r"first unit that differs is model\.layers\.1: .* hidden_states differ"):
        guard(Forgetful, write("llama"))


def test_model_that_stays_large_is_not_built(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelslim_transformers.tiny.MOST_PARAMETERS", 10)
    (line,) = guard(TransformersAdapter, write("llama"))
    assert "a tiny model of its architecture has still" in line


def test_indices_that_are_as_many_as_the_layers_are_not_taken_for_kinds(write: Any) -> None:
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"mlp_only_layers": [4, 7, 9], "hidden_act": "abc", "layer_types": ["a", "b", "a"]}

    assert count_layers(layers, Config()) == 2


def test_texts_come_with_a_mask_and_hold_no_special_token(write: Any, tmp_path: Path) -> None:
    adapter = TransformersAdapter("llama", write("llama", pad_token_id=3, eos_token_id=[5, 128001]))
    path = tmp_path / "tiny"
    path.mkdir()
    inputs = adapter.make_tiny_checkpoint(Session(adapter).init_model("meta"), path)
    assert len({sample["input_ids"].shape[1] for sample in inputs}) == len(inputs) > 1
    tiny = TransformersAdapter("llama", path).config
    assert (tiny.pad_token_id, tiny.eos_token_id, tiny.vocab_size) == (3, [5, 127], 128)
    for sample in inputs:
        assert sample["attention_mask"].all()
        assert not {3, 5, 127} & set(sample["input_ids"].flatten().tolist())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_no_weight_of_a_tiny_model_is_what_lay_in_memory_before(model_type: str, write: Any) -> None:
    adapter = TransformersAdapter(model_type, write(model_type), False)
    model = adapter.init_model("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory with NaN
    try:
        with adapter._twin(model) as (_, tiny, _inputs):
            wild = [name for name, one in tiny.named_parameters() if not bool((one.abs() < 100).all())]
    finally:
        torch.use_deterministic_algorithms(False)
    assert wild == []
