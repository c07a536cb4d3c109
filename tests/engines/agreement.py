# SPDX-License-Identifier: Apache-2.0
"""How far what an engine computed is from what our simulated forward computes on the same checkpoint.

Rounding activations to codes is chaotic: a value that lies next to the middle between two codes and differs in its
last bit moves all that follows, until two runs share no more than their distribution. So the forward is compared in
step with the engine: every quantized linear reads the input that it had there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelslim.quantized import QuantizedLinear
from modelslim.saved import load_model

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""What the engine makes one linear of."""

Job = Mapping[str, Any]


def watched(layers: int) -> list[str]:
    """The engine's names of all linears of so many layers."""
    inside = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in inside]


def simulated(job: Job, float_path: Path) -> nn.Module:
    """The saved model as we simulate it, in the dtype that the engine computed in."""
    path = Path(job["model"])
    model = load_model(path, None if path == float_path else float_path, device="cpu")
    quantized = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    numbers = {id(one) for part in quantized for one in part.buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == model.config.dtype and id(tensor) not in numbers:
            tensor.data = tensor.data.to(getattr(torch, job["dtype"]))
    return model


def logits(model: nn.Module, prompt: Sequence[int]) -> Tensor:
    """Float64 [tokens, vocabulary]."""
    with torch.no_grad():
        output: Tensor = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return output.double()


def divergence(engine: Tensor, ours: Tensor) -> float:
    """Mean over tokens of KL(engine || ours) in nats; every logit of the engine must be finite."""
    assert torch.isfinite(engine).all()
    p, q = engine.double()[:, : ours.shape[1]].log_softmax(-1), ours.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def divergences(job: Job, model: nn.Module) -> list[float]:
    """Of each prompt, both running freely."""
    tensors = load_file(job["tensors"])
    return [divergence(tensors[f"{index}.logits"], logits(model, one)) for index, one in enumerate(job["prompts"])]


def divergences_in_step(job: Job, model: nn.Module) -> tuple[list[float], float]:
    """KL of each prompt, our quantized linears reading the engine's inputs; and the largest error of an output."""
    tensors = load_file(job["tensors"])
    found: list[float] = []
    errors: list[float] = []
    for index, prompt in enumerate(job["prompts"]):
        with in_step(model, {name: tensors[f"{index}.{name}.in"] for name in job["watched"]}) as outputs:
            found.append(divergence(tensors[f"{index}.logits"], logits(model, prompt)))
        for name, ours in outputs.items():
            theirs = tensors[f"{index}.{name}.out"].double()
            errors.append(float((torch.cat(ours, -1) - theirs).norm() / theirs.norm()))
    assert errors, "no linear is quantized"
    return found, max(errors)


@contextmanager
def in_step(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, list[Tensor]]]:
    """Gives quantized linears these inputs, by the engine's names, and collects outputs, float64 [tokens, out]."""
    outputs: dict[str, list[Tensor]] = {}

    def replace(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[name].view(args[0].shape),)

    def collect(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output[0].double())

    hooks = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        place = f"{parent}.{FUSED.get(last, last)}"
        if isinstance(module, QuantizedLinear) and place in inputs:
            hooks.append(module.register_forward_pre_hook(partial(replace, place)))
            hooks.append(module.register_forward_hook(partial(collect, place)))
    yield outputs
    for hook in hooks:
        hook.remove()
