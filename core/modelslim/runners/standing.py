# SPDX-License-Identifier: Apache-2.0
"""Quantized linears that stand in the model for a while; a weight is decoded once, not for every sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelslim.quantized import QuantizedExperts, QuantizedLinear


@contextmanager
def in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let quantized linears and caches stand in the model while this is open.

    Args:
        model: the model.
        modules: by the names of the linears, and of the places of caches, that they replace.
    """
    originals = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, _decoded(module, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)


def _decoded(module: nn.Module, original: nn.Module) -> nn.Module:
    """A module that computes the same to the bit, with its weight decoded where it reads the input as it is."""
    if not isinstance(module, QuantizedLinear):
        return module
    if not module.spec.activation.is_float or module.input_multiplier is not None:
        return module
    dtype = original.get_parameter("weight").dtype
    return _DecodedExperts(module, dtype) if isinstance(module, QuantizedExperts) else _DecodedLinear(module, dtype)


class _DecodedLinear(nn.Module):
    def __init__(self, module: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._module = module
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight = module.weight.dequantize().to(dtype)
        self.bias = module.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # decoded for another type, it would be rounded twice
            return self._module.forward(x)
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class _DecodedExperts(nn.Module):
    def __init__(self, module: QuantizedExperts, dtype: torch.dtype) -> None:
        super().__init__()
        self._module = module
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight = torch.empty(module.codes.shape, dtype=dtype, device=module.codes.device)
        for expert in range(module.experts):
            self.weight[expert].copy_(module.linear(expert).weight.dequantize())
        self.bias = module.bias

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if x.dtype != self.weight.dtype:
            return self._module.forward(x, counts)
        y = x.new_zeros((len(x), self.out_features))
        start = 0
        for expert, count in enumerate(counts):
            if count:
                bias = None if self.bias is None else self.bias[expert].to(x.dtype)
                y[start : start + count] = F.linear(x[start : start + count], self.weight[expert], bias)
                start += count
        return y
