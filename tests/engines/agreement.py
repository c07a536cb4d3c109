# SPDX-License-Identifier: Apache-2.0
"""How far what an engine computed is from what our simulated forward computes on the same checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.quantized import QuantizedLinear
from modelslim.saved import load_model

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the engine makes one linear of."""


def watched(layers: Sequence[int]) -> list[str]:
    """The engine's names of all linears of some layers."""
    inside = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"model.layers.{layer}.{name}" for layer in layers for name in inside]


def simulated(job: Mapping[str, Any], float_path: Path) -> nn.Module:
    """The saved model as we simulate it, in the dtype that the engine computed in."""
    path = Path(job["model"])
    model = load_model(path, None if path == float_path else float_path, device="cpu")
    floats = {id(one) for part in model.modules() if isinstance(part, QuantizedLinear) for one in part.buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in floats and tensor.dtype != torch.float32:
            tensor.data = tensor.data.to(getattr(torch, job["dtype"]))
    return model


def divergences(job: Mapping[str, Any], model: nn.Module) -> list[float]:
    """Mean KL(engine || simulated) in nats over the tokens of each prompt; every logit of the engine is finite."""
    tensors = load_file(job["tensors"])
    found = []
    for index, prompt in enumerate(job["prompts"]):
        ours = logits(model, prompt)
        theirs = tensors[f"logits.{index}"][:, : ours.shape[1]]
        assert torch.isfinite(theirs).all()
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def logits(model: nn.Module, prompt: Sequence[int]) -> Tensor:
    """[tokens, vocabulary]."""
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return output


def continued(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """Tokens that our forward generates behind a prompt, greedily."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def linear_errors(job: Mapping[str, Any], model: nn.Module) -> dict[str, float]:
    """Relative error of every watched linear's output against our linear on the engine's own input."""
    tensors = load_file(job["tensors"])
    errors = {}
    for name in job["watched"]:
        parent, _, last = name.rpartition(".")
        x, theirs = tensors[f"{name}.in"], tensors[f"{name}.out"].double()
        with torch.no_grad():
            parts = [model.get_submodule(f"{parent}.{part}")(x) for part in FUSED.get(last, (last,))]
        ours = torch.cat(parts, -1).double()
        errors[name] = float((ours - theirs).norm() / theirs.norm())
    return errors
