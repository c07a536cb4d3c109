# SPDX-License-Identifier: Apache-2.0
"""Puts the core's fused experts in the place of those of transformers, which no algorithm can look into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from modelslim.api import WHOLE, ExpertLinear, FusedExperts


class StackedExperts(FusedExperts):
    """The experts of a transformers layer.

    Attributes:
        is_transposed: True where transformers holds the weights as [experts, in, out].
    """

    def __init__(
        self, linears: Mapping[str, ExpertLinear], activation: Callable[[Tensor], Tensor], is_transposed: bool
    ) -> None:
        super().__init__(linears, activation)
        self.is_transposed = is_transposed


def fuse_experts(model: nn.Module) -> None:
    """Replace the experts that follow the conventions of ``use_experts_implementation`` in transformers.

    Others stay as they are, and float.

    Args:
        model: on meta.
    """
    for name, module in list(model.named_modules()):
        if _is_conventional(module):
            model.set_submodule(name, _replacement(module))


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _is_conventional(module: Any) -> bool:
    if not hasattr(module, "_is_expert_parallel") or getattr(module, "has_post_expert_norm", False):
        return False
    expected = {*_names(module), *(f"{name}_bias" for name in _names(module) if module.has_bias)}
    parameters = dict(module.named_parameters())
    stacked = all(parameter.dim() == (2 if name.endswith("_bias") else 3) for name, parameter in parameters.items())
    return parameters.keys() == expected and stacked and not list(module.buffers())


def _replacement(module: Any) -> StackedExperts:
    linears = {}
    for name in _names(module):
        weight = getattr(module, name)
        experts, rows, columns = weight.shape
        if module.is_transposed:
            rows, columns = columns, rows
        linears[name] = ExpertLinear(
            experts,
            rows,
            columns,
            _parts(module, name, rows),
            bias=module.has_bias,
            dtype=weight.dtype,
            device=weight.device,
        )
        # The module lives on in its activation; its weights must not be held twice.
        delattr(module, name)
        if module.has_bias:
            delattr(module, f"{name}_bias")
    activation = module._apply_gate if module.has_gate else module.act_fn
    experts = StackedExperts(linears, activation, module.is_transposed)
    return experts.train(module.training)


def _parts(module: Any, name: str, rows: int) -> dict[str, slice]:
    if name != "gate_up_proj":
        return {name: WHOLE}
    if module.is_concatenated:
        return {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
