# SPDX-License-Identifier: Apache-2.0
"""The experts of Qwen3-VL-MoE: put into a form that can be quantized, and found in either stored layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from modelslim.api import WHOLE, ExpertLinear, FusedExperts, WeightSource


def fuse_experts(model: nn.Module) -> None:
    """Replace every layer's stacked experts, which are bare parameters, by modules that algorithms know.

    Args:
        model: on meta.
    """
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    for name, module in list(model.named_modules()):
        if isinstance(module, Qwen3VLMoeTextExperts):
            model.set_submodule(name, _fused(module))


def _fused(module: Any) -> FusedExperts:
    experts, hidden, inner = module.down_proj.shape
    place: Mapping[str, Any] = {"dtype": module.down_proj.dtype, "device": module.down_proj.device}
    gate_then_up = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
    linears = {
        "gate_up_proj": ExpertLinear(experts, 2 * inner, hidden, gate_then_up, **place),
        "down_proj": ExpertLinear(experts, hidden, inner, {"down_proj": WHOLE}, **place),
    }
    return FusedExperts(linears, partial(_gated, module.act_fn))


def _gated(act_fn: nn.Module, x: Tensor) -> Tensor:
    """[tokens, 2 * inner] -> [tokens, inner]."""
    gate, up = x.chunk(2, dim=-1)
    product: Tensor = act_fn(gate) * up
    return product


def expert_sources(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightSource]:
    """Where the weights of the fused experts lie.

    Checkpoints hold one tensor per stacked weight, without ``.weight`` behind its name. The published ones
    hold it as [experts, in, out]; one that transformers 5 has saved again, as [experts, out, in].

    Args:
        model: its experts fused.
        shapes: of all stored tensors, by name.
    """
    sources = {}
    for path, module in model.named_modules():
        if not isinstance(module, FusedExperts):
            continue
        linears = {name: one for name, one in module.named_children() if isinstance(one, ExpertLinear)}
        # A square weight fits either way round; the two of a layer are never both square.
        is_transposed = any(shapes.get(f"{path}.{name}") != tuple(one.weight.shape) for name, one in linears.items())
        for name in linears:
            convert = _transpose if is_transposed else None
            sources[f"{path}.{name}.weight"] = WeightSource((f"{path}.{name}",), convert)
    return sources


def _transpose(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2).contiguous()
