# SPDX-License-Identifier: Apache-2.0
"""A decoder layer in plain torch with all kinds of subgraphs, its description, and statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelslim.api import (
    Algorithm,
    ExpertLinear,
    FusedExperts,
    LinearInfo,
    Statistic,
    Subgraph,
    Unit,
    UnitStatistics,
)

NAME = "model.layers.0"


class RMSNorm(nn.Module):
    """With an eps that is not the usual one; ``1 + weight`` when asked."""

    def __init__(self, size: int, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) * 0.5 + (-0.3 if unit_offset else 0.7))
        self.unit_offset = unit_offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 3e-3)
        return (wide * (self.weight + 1.0 if self.unit_offset else self.weight)).to(x.dtype)


class Router(nn.Module):
    """Not an ``nn.Linear``, as in transformers."""

    def __init__(self, size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        top, index = logits.softmax(-1).topk(2, dim=-1)
        return top, index


class Attention(nn.Module):
    def __init__(self, size: int, heads: int, kv_heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size // heads
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(size, kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).view(len(x), one.out_features // self.size, self.size).transpose(0, 1)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, 0) for one in (k, v))
        probabilities = (q @ k.transpose(1, 2) / self.size**0.5).softmax(-1)
        return self.o_proj((probabilities @ v).transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=True)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, size: int, inner: int, number: int) -> None:
        super().__init__()
        self.gate = Router(size, number)
        parts = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)}
        banks = {
            "gate_up_proj": ExpertLinear(number, 2 * inner, size, parts),
            "down_proj": ExpertLinear(number, size, inner, {"down_proj": slice(None)}),
        }
        for bank in banks.values():
            bank.weight.copy_(torch.randn(bank.weight.shape) * 0.2)
        self.experts = FusedExperts(banks, self.activation)

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        top, index = self.gate(x)
        y: Tensor = self.experts(x, index, top)
        return y


class Layer(nn.Module):
    """Attention and MLP, dense or with experts.

    Outliers sit in every tensor that can be smoothed, and one channel of each is dead.
    """

    def __init__(self, *, experts: int, kv_heads: int, norm: str, bias: bool = True) -> None:
        super().__init__()
        size, inner = 32, 24
        make: Mapping[str, Callable[[], nn.Module]] = {
            "rms": lambda: RMSNorm(size),
            "offset": lambda: RMSNorm(size, unit_offset=True),
            "layer": lambda: nn.LayerNorm(size, eps=2e-4),
        }
        self.input_layernorm, self.post_attention_layernorm = make[norm](), make[norm]()
        self.self_attn = Attention(size, 8, kv_heads, bias=bias)
        self.mlp = Experts(size, inner, experts) if experts else MLP(size, inner)
        self.experts, self.heads, self.norm = experts, (8, kv_heads), norm
        for one in (self.input_layernorm, self.post_attention_layernorm):
            if norm == "layer":
                one.weight.copy_(torch.rand(size) + 0.5)
                one.bias.copy_(torch.randn(size))
            one.weight[3] *= 40
        self.self_attn.v_proj.weight[2] *= 30
        if isinstance(self.mlp, MLP):
            self.mlp.up_proj.weight[5] *= 50
            self.mlp.up_proj.weight[7] = 0
            self.mlp.up_proj.bias[7] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))

    def subgraphs(self) -> tuple[Subgraph, ...]:
        """In an order that is not the order of work."""
        attention, mlp = f"{NAME}.self_attn", f"{NAME}.mlp"
        offset = self.norm == "offset"
        readers = ("experts.gate_up_proj", "gate") if self.experts else ("gate_proj", "up_proj")
        targets = tuple(f"{mlp}.{one}" for one in readers)
        inner = (
            Subgraph("up-down", f"{mlp}.experts.gate_up_proj", (f"{mlp}.experts.down_proj",), rows=tuple(range(24, 48)))
            if self.experts
            else Subgraph("up-down", f"{mlp}.up_proj", (f"{mlp}.down_proj",))
        )
        projections = tuple(f"{attention}.{one}_proj" for one in "qkv")
        return (
            Subgraph("norm-linear", f"{NAME}.input_layernorm", projections, unit_offset=offset),
            Subgraph("norm-linear", f"{NAME}.post_attention_layernorm", targets, unit_offset=offset),
            Subgraph("ov", f"{attention}.v_proj", (f"{attention}.o_proj",), heads=self.heads),
            inner,
        )


@dataclass
class Toy:
    """A layer, some tokens, and how algorithms see it."""

    layer: Layer
    x: Tensor
    subgraphs: tuple[Subgraph, ...] | None = None

    @property
    def unit(self) -> Unit:
        modules = dict(self.layer.named_modules(prefix=NAME))
        linears = {name: one for name, one in modules.items() if isinstance(one, (nn.Linear, ExpertLinear))}
        return Unit(NAME, linears, {}, modules, self.layer.subgraphs() if self.subgraphs is None else self.subgraphs)

    @property
    def infos(self) -> list[LinearInfo]:
        found = []
        for name, one in self.unit.linears.items():
            parent = name.rpartition(".")[0]
            names = (
                [f"{parent}.{number}.{part}" for number in range(one.experts) for part in one.parts]
                if isinstance(one, ExpertLinear)
                else [name]
            )
            bank = name if isinstance(one, ExpertLinear) else ""
            rows, columns = one.weight.shape[-2:]
            found += [LinearInfo(each, each, NAME, rows, columns, False, "bfloat16", bank) for each in names]
        return found

    def measure(self, algorithm: Algorithm, *more: type[Statistic]) -> UnitStatistics:
        """What the algorithm needs, and more of the same inputs, of all tokens."""
        needs = {name: kinds | frozenset(more) for name, kinds in algorithm.needs(self.unit).items()}
        return measure(self.layer, self.unit, needs, self.x)

    def apply(self, algorithm: Algorithm, *more: type[Statistic]) -> UnitStatistics:
        """Measure and apply."""
        algorithm.select(self.infos)
        statistics = self.measure(algorithm, *more)
        assert algorithm.apply(self.unit, statistics) == {}
        return statistics


def measure(layer: nn.Module, unit: Unit, needs: Mapping[str, frozenset[type[Statistic]]], x: Tensor) -> UnitStatistics:
    """Statistics of the inputs of the named modules, without sharing."""
    ports: dict[str, dict[type[Statistic], Statistic]] = {}
    experts: dict[str, list[dict[type[Statistic], Statistic]]] = {}
    handles = []
    for name, kinds in needs.items():
        module = unit.modules[name]
        if isinstance(module, ExpertLinear):
            experts[name] = [{kind: kind() for kind in kinds} for _ in range(module.experts)]
        else:
            ports[name] = {kind: kind() for kind in kinds}

        def observe(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if name in ports:
                for statistic in ports[name].values():
                    statistic.update(args[0])
                return
            for port, rows in zip(experts[name], args[0].split(args[1]), strict=True):
                for statistic in port.values():
                    statistic.update(rows)

        handles.append(module.register_forward_pre_hook(observe))
    layer(x)
    for handle in handles:
        handle.remove()
    return UnitStatistics(ports, experts)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Makes toys: ``toy(experts=4, kv_heads=2, norm="rms", dtype=torch.float64)``."""

    def make(
        *,
        experts: int = 0,
        kv_heads: int = 2,
        norm: str = "rms",
        dtype: torch.dtype = torch.float64,
        tokens: int = 60,
        bias: bool = True,
    ) -> Toy:
        torch.manual_seed(0)
        layer = Layer(experts=experts, kv_heads=kv_heads, norm=norm, bias=bias).requires_grad_(False).to(dtype)
        return Toy(layer, (torch.randn(tokens, 32) + torch.randn(32)).to(dtype))

    return make
