# SPDX-License-Identifier: Apache-2.0
"""Text adapters of the existing tool keep to the contract of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelslim.cli.main import main
from modelslim.testing.adapter import AdapterContract
from msmodelslim.model.common.layer_wise_forward import transformers_generated_forward_func

DYNAMIC = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*experts*"]
  save:
    - type: ascendv1_saver
"""
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "tie_word_embeddings": False,
}


class TextContract(AdapterContract):
    """The whole forward is that of transformers, on its own copy of the weights."""

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(checkpoint).eval()(*inputs, use_cache=False).logits


class TestTiedLlama(TextContract):
    @pytest.fixture
    def checkpoint(self, text_model: Callable[..., Path]) -> Path:
        return text_model("llama", tie_word_embeddings=True)

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> Any:
        from old_text import OldText

        class WithLogits(OldText):
            """Returns the model's output, which adapters of the existing tool have no need for."""

            def generate_model_forward(self, model: nn.Module, inputs: Any) -> Any:
                return (yield from transformers_generated_forward_func(model, inputs))

        return WithLogits("llama", checkpoint)


class TestMixtureOfExperts(TextContract):
    """Its experts, which transformers 5 fuses, stay fused and are quantized as a batch."""

    @pytest.fixture
    def checkpoint(self, text_model: Callable[..., Path]) -> Path:
        return text_model("qwen3_moe", **MOE)

    @pytest.fixture
    def adapter(self, checkpoint: Path) -> Any:
        from msmodelslim.model.default.model_adapter import DefaultModelAdapter

        return DefaultModelAdapter("qwen3_moe", checkpoint)


def test_fused_experts_of_a_text_adapter_are_quantized(text_model: Callable[..., Path], tmp_path: Path) -> None:
    protocol, path = tmp_path / "protocol.yaml", text_model("qwen3_moe", **MOE)
    protocol.write_text(DYNAMIC, encoding="utf-8")
    done = main(
        f"quant --model_path {path} --save_path {tmp_path / 'result'} --device cpu --model_type Old-Text "
        f"--config_path {protocol}".split()
    )
    assert done == 0
    types = json.loads((tmp_path / "result" / "quant_model_description.json").read_text(encoding="utf-8"))
    experts = {name for name, kind in types.items() if kind == "W8A8_DYNAMIC" and name.endswith(".weight")}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(3)
        for expert in range(4)
        for part in ("gate", "up", "down")
    }


def test_batches_are_filled_up(text_model: Callable[..., Path]) -> None:
    from msmodelslim.core.const import DeviceType
    from msmodelslim.model.default.model_adapter import DefaultModelAdapter

    adapter = DefaultModelAdapter("llama", text_model("llama"))
    batches = adapter.handle_dataset_by_batch(["one", "one and another one", "last"], 2, DeviceType.CPU)
    assert [ids.shape[0] for (ids,) in batches] == [2, 1]
    (ids,) = batches[0]
    alone = adapter.tokenizer("one")["input_ids"]
    assert torch.equal(ids[0], torch.tensor([*alone, *[0] * (ids.shape[1] - len(alone))]))
