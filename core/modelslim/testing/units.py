# SPDX-License-Identifier: Apache-2.0
"""Small units with weights and inputs, on which the contract puts algorithms to work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelslim.algorithm import Algorithm, Unit
from modelslim.context import Context
from modelslim.experts import ExpertLinear
from modelslim.loader import dtype_name
from modelslim.ports import Kinds, PortCollector
from modelslim.types import LinearInfo, ProcessRequest, QuantSpec, Subgraph
from modelslim.unit_statistics import S, UnitStatistics

UNIT = "model.layers.0"
SAMPLES, TOKENS = 3, 60


class Bench:
    """A unit with inputs.

    Attributes:
        module: the unit.
        linears: its linears by their full names.
        calls: the arguments of its forward, one tuple per sample.
        subgraphs: where smoothing may act in it.
        context: what algorithms of one stage hand over.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Linear],
        calls: Sequence[tuple[Any, ...]],
        subgraphs: Sequence[Subgraph] = (),
    ) -> None:
        self.module = module
        self.linears = linears
        self.calls = calls
        self.subgraphs = subgraphs
        self.context = Context()

    def unit(self, algorithm: Algorithm) -> Unit:
        """The unit as the engine shows it, for a saver whose engine holds scales in bfloat16."""
        specs = {
            name: QuantSpec(
                replace(spec.weight, scale_dtype="bfloat16"),
                replace(spec.activation, scale_dtype="bfloat16"),
            )
            for name, spec in algorithm.select(describe(self.linears)).items()
            if name in self.linears
        }
        modules = dict(self.module.named_modules(prefix=UNIT))
        handed = self.context.view(algorithm.hands_over, algorithm.takes_over)
        unit = Unit(UNIT, self.linears, specs, modules, self.subgraphs, self.module, context=handed)
        if not algorithm.replays:
            return unit
        calls = [ProcessRequest(UNIT, self.module, call) for call in self.calls]
        return replace(unit, calls=calls, targets=[self.module(*call) for call in self.calls])

    def measure(self, needs: Mapping[str, Kinds], samples: slice = slice(None)) -> WatchedStatistics:
        """These statistics of some samples."""
        modules = dict(self.module.named_modules(prefix=UNIT))
        with PortCollector({**modules, **self.linears}, needs) as ports:
            for call in self.calls[samples]:
                self.module(*call)
                ports.next_sample()
        ports.statistics()
        return WatchedStatistics(ports, needs)

    def run(self) -> list[Tensor]:
        """What the unit gives for each sample."""
        return [self.module(*call) for call in self.calls]

    def copy(self) -> Bench:
        """One whose weights may be changed."""
        return deepcopy(self)


class WatchedStatistics(UnitStatistics):
    """Gives what was declared and nothing else, and remembers what was read."""

    def __init__(self, ports: PortCollector, needs: Mapping[str, Kinds]) -> None:
        super().__init__(ports.ports, ports.experts)
        self._declared = {(name, kind) for name, kinds in needs.items() for kind in kinds}
        self._port_of = {name: id(port) for name, port in ports.ports.items()}
        self._read: set[tuple[int | str, type[Any]]] = set()

    @property
    def unread(self) -> set[tuple[str, type[Any]]]:
        """Linears and kinds that nobody has asked for, of these or of any linear that shared the input."""
        return {
            (name, kind) for name, kind in self._declared if (self._port_of.get(name, name), kind) not in self._read
        }

    def get(self, linear: str, kind: type[S]) -> S:
        """See there.

        Raises:
            KeyError: it was not declared.
        """
        self._note(linear, kind)
        return super().get(linear, kind)

    def get_experts(self, linear: str, kind: type[S]) -> list[S]:
        """See there.

        Raises:
            KeyError: it was not declared.
        """
        self._note(linear, kind)
        return super().get_experts(linear, kind)

    def _note(self, linear: str, kind: type[Any]) -> None:
        if (linear, kind) not in self._declared:
            raise KeyError(f"{kind.__name__} of {linear} is read, and needs() does not declare it")
        self._read.add((self._port_of.get(linear, linear), kind))


def random_linears() -> Mapping[str, nn.Linear]:
    """Three linears of a decoder layer in bfloat16, by name; their inputs divide by 128."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (256, 128), "self_attn.k_proj": (256, 64), "mlp.down_proj": (384, 256)}
    linears = {}
    for name, (columns, rows) in shapes.items():
        linear = nn.Linear(columns, rows, bias=name.endswith("q_proj"), dtype=torch.bfloat16).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        linears[f"{UNIT}.{name}"] = linear
    return linears


def random_experts() -> ExpertLinear:
    """One linear of three experts in bfloat16."""
    bank = ExpertLinear(3, 64, 128, {"down_proj": slice(None)}, dtype=torch.bfloat16)
    bank.weight.copy_(torch.randn(bank.weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return bank


def side_by_side(linears: Mapping[str, nn.Linear], samples: int = SAMPLES) -> Bench:
    """A unit that does nothing but apply the linears, each to an input of its own.

    Inputs are small whole numbers: sums of them and of their products are exact in any order, so statistics of
    two halves are those of the whole to the bit.
    """
    generator = torch.Generator().manual_seed(1)
    calls = []
    for number in range(samples):
        inputs = {}
        for name, linear in linears.items():
            shape = (1, TOKENS, linear.in_features)
            common = torch.randn((1, TOKENS, 1), generator=generator)
            # Later samples are larger, so each tells something new.
            mixed = ((number + 2) * (torch.randn(shape, generator=generator) + 0.3 * common)).round()
            inputs[name] = mixed.to(linear.weight.dtype)
        calls.append((inputs,))
    return Bench(_SideBySide(linears), linears, calls)


class _SideBySide(nn.Module):
    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            *path, last = name.removeprefix(f"{UNIT}.").split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, linear)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Inputs by the full name of the linear; outputs in their order."""
        return tuple(self.get_submodule(name.removeprefix(f"{UNIT}."))(x) for name, x in inputs.items())


def random_layer() -> Bench:
    """A decoder layer in float32 with two key/value heads for four heads, and its subgraphs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layer = _Layer().requires_grad_(False)
        calls = [(torch.randn(1, TOKENS, _HIDDEN),) for _ in range(SAMPLES)]
    linears = {f"{UNIT}.{name}": one for name, one in layer.named_modules() if isinstance(one, nn.Linear)}
    subgraphs = (
        _subgraph("norm-linear", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        _subgraph("ov", "self_attn.v_proj", ("self_attn.o_proj",), (_HEADS, _GROUPS)),
        _subgraph("norm-linear", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        _subgraph("up-down", "mlp.up_proj", ("mlp.down_proj",)),
    )
    return Bench(layer, linears, calls, subgraphs)


def _subgraph(kind: str, source: str, targets: Iterable[str], heads: tuple[int, int] | None = None) -> Subgraph:
    return Subgraph(kind, f"{UNIT}.{source}", tuple(f"{UNIT}.{name}" for name in targets), heads)


_HIDDEN, _INNER, _HEADS, _GROUPS = 128, 256, 4, 2


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Some channels are much larger than others, as in models that want smoothing.
        self.weight = nn.Parameter(torch.rand(_HIDDEN) + 0.5)
        self.weight.data[::9] *= 20

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = _HIDDEN // _HEADS
        self.q_proj = nn.Linear(_HIDDEN, _HIDDEN, bias=False)
        self.k_proj = nn.Linear(_HIDDEN, _GROUPS * size, bias=False)
        self.v_proj = nn.Linear(_HIDDEN, _GROUPS * size)
        self.o_proj = nn.Linear(_HIDDEN, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).unflatten(-1, (-1, _HIDDEN // _HEADS)).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (one.repeat_interleave(_HEADS // _GROUPS, 1) for one in (k, v))
        y: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_HIDDEN, _INNER, bias=False)
        self.up_proj = nn.Linear(_HIDDEN, _INNER, bias=False)
        self.down_proj = nn.Linear(_INNER, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = _Norm()
        self.self_attn = _Attention()
        self.post_attention_layernorm = _Norm()
        self.mlp = _MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [1, tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x))
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


def describe(linears: Mapping[str, nn.Linear]) -> list[LinearInfo]:
    """What the plan tells of the linears, and of one outside the units."""
    infos = [
        LinearInfo(
            name,
            name,
            UNIT,
            linear.out_features,
            linear.in_features,
            linear.bias is not None,
            dtype_name(linear.weight.dtype),
        )
        for name, linear in linears.items()
    ]
    return [*infos, LinearInfo("lm_head", "lm_head", "", 512, 256, False, "bfloat16")]
