# SPDX-License-Identifier: Apache-2.0
"""The adapter on tiny models of the family, against transformers' own loader and MTP model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.api import VlmCalibSample
from modelslim.checkpoint import Checkpoint
from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim_glm.adapter import GlmAdapter

CASES = [("glm4_moe", 1), ("glm4_moe", 0), ("glm4_moe_lite", 1), ("glm4v_moe", 0), ("glm4v_moe", 1)]
Stored = Callable[..., Path]


def adapter_of(path: Path) -> GlmAdapter:
    return GlmAdapter(json.loads((path / "config.json").read_text())["model_type"], path)


@lru_cache(maxsize=1)
def reference(path: Path) -> Any:
    """The model as transformers itself loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    sees = "vision_config" in json.loads((path / "config.json").read_text())
    return (AutoModelForMultimodalLM if sees else AutoModelForCausalLM).from_pretrained(path)


def opened_whole(path: Path) -> OpenModel:
    """The model with every parameter loaded."""
    with Checkpoint(path) as checkpoint:
        found = OpenModel.of(adapter_of(path), checkpoint)
        found.fill()
    return found


# The processor hands torch tensors to numpy, which torch does not yet do as numpy 2 wants it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestGlm(AdapterContract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> tuple[str, int]:
        return request.param  # type: ignore[no-any-return]

    @pytest.fixture
    def checkpoint(self, case: tuple[str, int], stored: Stored) -> Path:
        return stored(*case)

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> object:
        return adapter_of(checkpoint)

    @pytest.fixture
    def samples(self, case: tuple[str, int], pictures: Sequence[Path]) -> Sequence[Any]:
        if case[0] != "glm4v_moe":
            return ("seven 7", "twelve chars", "x")
        return (*(VlmCalibSample("what", str(picture)) for picture in pictures), "text alone")

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return reference(checkpoint)(**inputs, use_cache=False).logits

    def test_parameters_and_buffers_are_those_of_from_pretrained(
        self, opened: OpenModel, case: tuple[str, int], checkpoint: Path
    ) -> None:
        opened.fill()
        state = opened.model.state_dict() | dict(opened.model.named_buffers())
        expected = reference(checkpoint).state_dict() | dict(reference(checkpoint).named_buffers())
        # Fused experts are modules here and parameters there.
        actual = {name if name in expected else name.removesuffix(".weight"): name for name in state}
        added = {".".join(name.split(".")[:3]) for name in actual.keys() - expected.keys()}
        assert added == ({"model.layers.3"} if case[1] and case[0] != "glm4v_moe" else set())
        for name, tensor in expected.items():
            assert (name, state[actual[name]].dtype) == (name, tensor.dtype)
            assert torch.equal(state[actual[name]], tensor), name

    def test_units_are_the_tower_the_layers_and_then_those_of_mtp(
        self, case: tuple[str, int], opened: OpenModel
    ) -> None:
        expected = {
            "glm4v_moe": ["model.visual", *(f"model.language_model.layers.{index}" for index in range(3))],
        }.get(case[0], [f"model.layers.{index}" for index in range(3 + case[1])])
        assert [request.name for request in opened.visit] == expected

    def test_every_stored_tensor_makes_a_parameter_or_is_of_an_mtp_layer(
        self, case: tuple[str, int], opened: OpenModel
    ) -> None:
        named = {key for source in opened.loader.sources.values() for key in source.keys}
        left = opened.checkpoint.tensors.keys() - named
        if case[0] == "glm4v_moe":  # whose MTP layers are not built
            mtp = "model.language_model.layers.3."
            assert left == {name for name in opened.checkpoint.tensors if name.startswith(mtp)}
            assert bool(left) == bool(case[1])
        else:
            shared = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
            assert left == (shared if case[1] else set())


@pytest.mark.parametrize("mtp_layers", [1, 2])
def test_mtp_layers_give_what_those_of_transformers_give(mtp_layers: int, stored: Stored) -> None:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    path = stored("glm4_moe", mtp_layers)
    main = reference(path)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34].*"]
    mtp = MtpModel.from_pretrained(main)
    ids = torch.tensor([[5, 9, 30, 7, 7, 21, 12]])
    expected: list[Tensor] = []
    found = opened_whole(path)
    with torch.no_grad():
        output = main(ids, output_hidden_states=True, use_cache=False)
        hidden, logits = output.hidden_states[-1], output.logits
        for layer in mtp.layers:
            layer.register_forward_hook(lambda _module, _args, output: expected.append(output))
        shifted = torch.cat((ids[:, 1:], logits[:, -1:].argmax(-1)), 1)
        mtp(shifted, hidden, None, torch.arange(1, 8)[None], MtpCache(config=main.config.get_mtp_config()))
        actual = adapter_of(path).run_mtp_layers(found.model, ids, hidden, logits)
    assert len(actual) == len(expected) == mtp_layers
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other), (one - other).abs().max()


@pytest.mark.parametrize(("model_type", "prefix"), [("glm4_moe", "model"), ("glm4v_moe", "model.language_model")])
def test_router_bias_is_kept_in_float32(model_type: str, prefix: str, stored: Stored) -> None:
    path = stored(model_type, 1)
    state, tensors = opened_whole(path).model.state_dict(), load_file(path / "model.safetensors")
    for layer in (1, 2):
        name = f"{prefix}.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert state[name].dtype == tensors[name].dtype == torch.float32
        assert torch.equal(state[name], tensors[name])
        assert not torch.equal(tensors[name].bfloat16().float(), tensors[name])
