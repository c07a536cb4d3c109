# SPDX-License-Identifier: Apache-2.0
"""Fused experts: against plain loops, against each expert alone, and without tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from modelslim.algorithm import Unit
from modelslim.api import (
    WHOLE,
    ExpertLinear,
    FusedExperts,
    QuantizationError,
    QuantizedExperts,
    QuantSpec,
    TensorRange,
    TensorSpec,
    TokenCount,
)
from modelslim.coverage import cover
from modelslim.ports import PortCollector
from modelslim.registry import Registry
from modelslim.run import quantize

EXPERTS, HIDDEN, INNER, TOP = 5, 16, 12, 2
BOTH = frozenset({TensorRange, TokenCount})


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def activation(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def layer(request: pytest.FixtureRequest) -> FusedExperts:
    torch.manual_seed(0)
    halves = {"gate_proj": slice(0, INNER), "up_proj": slice(INNER, 2 * INNER)}
    linears = {
        "gate_up_proj": ExpertLinear(EXPERTS, 2 * INNER, HIDDEN, halves, bias=True, dtype=request.param),
        "down_proj": ExpertLinear(EXPERTS, HIDDEN, INNER, {"down_proj": WHOLE}, dtype=request.param),
    }
    layer = FusedExperts(linears, activation).eval()
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return layer


def routed(tokens: int, dtype: torch.dtype, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a layer; the routers send nothing to expert 3."""
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand((tokens, experts), generator=generator)
    weights[:, 3] = -1
    top, index = weights.topk(TOP)
    return torch.randn((tokens, HIDDEN), generator=generator).to(dtype), index, top.to(dtype)


def by_loops(layer: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert at a time, in float64."""
    up, bias, down = (
        tensor.double() for tensor in (layer.gate_up_proj.weight, layer.gate_up_proj.bias, layer.down_proj.weight)
    )
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            if expert < EXPERTS:
                inner = activation(up[expert] @ x[token].double() + bias[expert])
                result[token] += weight * (down[expert] @ inner)
    return result


@pytest.mark.parametrize("tokens", [1, 40])
def test_every_token_passes_its_experts(layer: FusedExperts, tokens: int) -> None:
    x, index, weights = routed(tokens, layer.down_proj.weight.dtype)  # type: ignore[union-attr, arg-type]
    expected = by_loops(layer, x, index, weights)
    tolerance = 1e-5 if x.dtype == torch.float32 else 3e-2
    assert torch.allclose(layer(x, index, weights).double(), expected, atol=tolerance, rtol=tolerance)


def test_a_number_beyond_the_experts_stands_for_none(layer: FusedExperts) -> None:
    x, index, weights = routed(8, layer.down_proj.weight.dtype)  # type: ignore[union-attr, arg-type]
    index[2:5, 1] = EXPERTS
    expected = by_loops(layer, x, index, weights)
    y = layer(x, index, weights)
    assert y.isfinite().all()
    assert torch.allclose(y.double(), expected, atol=3e-2, rtol=3e-2)


def test_tokens_of_each_expert_are_counted(layer: FusedExperts) -> None:
    inputs = [routed(tokens, layer.down_proj.weight.dtype) for tokens in (7, 40)]  # type: ignore[union-attr, arg-type]
    for sample in inputs:
        layer(*sample)
    counted = torch.cat([index.reshape(-1) for _, index, _ in inputs]).bincount(minlength=EXPERTS)
    assert layer.tokens_seen == counted.tolist()
    assert layer.tokens_seen[3] == 0
    layer.count_tokens()
    assert sum(layer.tokens_seen) == 0


def collected(layer: FusedExperts, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> PortCollector:
    linears = {f"mlp.experts.{name}": child for name, child in layer.named_children()}
    with PortCollector(linears, dict.fromkeys(linears, BOTH)) as ports:
        for sample in inputs:
            layer(*sample)
            ports.next_sample()
    return ports


def test_each_expert_is_measured_on_its_own_tokens(layer: FusedExperts) -> None:
    inputs = [routed(tokens, torch.float32) for tokens in (9, 30)]
    layer.float()
    statistics = collected(layer, inputs).statistics()
    ranges = statistics.get_experts("mlp.experts.gate_up_proj", TensorRange)
    inner = statistics.get_experts("mlp.experts.down_proj", TensorRange)
    first: Any = layer.gate_up_proj
    for expert in range(EXPERTS):
        seen = torch.cat([x[(index == expert).any(1)] for x, index, _ in inputs])
        count = statistics.get_experts("mlp.experts.down_proj", TokenCount)[expert]
        assert count.tokens == len(seen)
        if expert == 3:
            assert ranges[expert].minimum is None
            continue
        assert ranges[expert].minimum == seen.min() and ranges[expert].maximum == seen.max()
        hidden = activation(seen @ first.weight[expert].t() + first.bias[expert])
        assert inner[expert].maximum is not None
        assert torch.allclose(inner[expert].maximum, hidden.max(), rtol=1e-4)


def test_all_tokens_can_be_shown_to_every_expert_without_changing_the_output(layer: FusedExperts) -> None:
    layer.float()
    inputs = [routed(tokens, torch.float32) for tokens in (9, 30)]
    before = [layer(*sample) for sample in inputs]
    layer.show_all = True
    layer.count_tokens()
    ports = collected(layer, inputs)
    assert all(torch.equal(layer(*sample), y) for sample, y in zip(inputs, before, strict=True))
    every = torch.cat([x for x, _, _ in inputs])
    for found in ports.statistics().get_experts("mlp.experts.gate_up_proj", TensorRange):
        assert (found.minimum, found.maximum) == (every.min(), every.max())
    assert ports.tokens["mlp.experts.down_proj"] == [39] * EXPERTS
    assert cover(ports, list(ports.tokens), "all") == []
    assert layer.tokens_seen[3] == 0  # what the router did is still told


def test_fallback_takes_what_the_other_experts_saw(layer: FusedExperts) -> None:
    layer.float()
    inputs = [routed(30, torch.float32)]
    ports = collected(layer, inputs)
    borrowed = cover(ports, list(ports.tokens), "fallback")
    assert borrowed == ["mlp.experts.3.gate_up_proj", "mlp.experts.3.down_proj"]
    ranges = ports.statistics().get_experts("mlp.experts.gate_up_proj", TensorRange)
    others = [one for number, one in enumerate(ranges) if number != 3]
    assert ranges[3].minimum == min(one.minimum for one in others if one.minimum is not None)
    assert ranges[3].maximum == max(one.maximum for one in others if one.maximum is not None)


def test_route_refuses_an_expert_without_tokens_by_name(layer: FusedExperts) -> None:
    ports = collected(layer.float(), [routed(30, torch.float32)])
    with pytest.raises(QuantizationError, match=r"mlp\.experts\.3\.gate_up_proj: no calibration token") as caught:
        cover(ports, list(ports.tokens), "route")
    assert "experts: fallback" in (caught.value.hint or "")


def test_a_layer_that_no_token_reached_has_nothing_to_borrow(layer: FusedExperts) -> None:
    ports = collected(layer.float(), [])
    with pytest.raises(QuantizationError, match="and 4 more experts of this layer"):
        cover(ports, list(ports.tokens), "fallback")


def test_experts_that_are_linears_of_their_own_fall_back_as_well() -> None:
    linears = {f"mlp.experts.{number}.up_proj": torch.nn.Linear(8, 4) for number in range(3)}
    with PortCollector(linears, dict.fromkeys(linears, BOTH)) as ports:
        for number, scale in ((0, 1.0), (2, 5.0)):
            linears[f"mlp.experts.{number}.up_proj"](torch.linspace(-scale, scale, 16).view(2, 8))
            ports.next_sample()
    assert cover(ports, list(linears), "fallback") == ["mlp.experts.1.up_proj"]
    found = ports.statistics().get("mlp.experts.1.up_proj", TensorRange)
    assert (found.minimum, found.maximum) == (-5, 5)
    assert ports.statistics().get("mlp.experts.1.up_proj", TokenCount).tokens == 4


WEIGHTS = [
    TensorSpec("int8", "per_channel"),
    TensorSpec("int8", "per_channel", symmetric=False),
    TensorSpec("int4", "per_group", group_size=4),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=["int8", "asymmetric", "int4-groups"])
@pytest.mark.parametrize("scope", ["float", "per_token", "per_tensor"])
def test_all_experts_at_once_become_what_each_becomes_alone(
    weight: TensorSpec, scope: str, layer: FusedExperts
) -> None:
    """The batch against one nn.Linear per expert through the same algorithm."""
    if scope != "float" and not weight.symmetric:
        pytest.skip("no format has it")
    activation_spec = TensorSpec("float", "per_tensor") if scope == "float" else TensorSpec("int8", scope)
    spec = QuantSpec(weight, activation_spec)
    inputs = [routed(60, layer.down_proj.weight.dtype)]  # type: ignore[union-attr, arg-type]
    ports = collected(layer, inputs)
    cover(ports, list(ports.tokens), "fallback")
    config = {"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}}
    algorithm = Registry.scan().load("algorithms", "linear_quant").from_config(config)
    linears = {f"mlp.experts.{name}": child for name, child in layer.named_children()}
    made = algorithm.apply(Unit("mlp", linears, dict.fromkeys(linears, spec)), ports.statistics())
    for name, linear in linears.items():
        assert isinstance(linear, ExpertLinear)
        bank = made[name]
        assert isinstance(bank, QuantizedExperts)
        single = {}
        for expert in range(EXPERTS):
            alone = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            alone.weight = torch.nn.Parameter(linear.weight[expert], requires_grad=False)
            if linear.bias is not None:
                alone.bias = torch.nn.Parameter(linear.bias[expert], requires_grad=False)
            single[str(expert)] = alone
        seen = {str(number): port for number, port in enumerate(ports.experts[name])}
        statistics = type(ports.statistics())(seen)
        expected = algorithm.apply(Unit("mlp", single, dict.fromkeys(single, spec)), statistics)
        counts = [3, 0, 4, 1, 2]
        x = torch.randn((10, linear.in_features)).to(linear.weight.dtype)
        y = bank(x, counts)
        for expert, rows in enumerate(x.split(counts)):
            part = bank.linear(expert)
            other = expected[str(expert)]
            assert torch.equal(part.codes, other.codes)
            assert torch.equal(part.scale, other.scale)
            assert part.input_scale is None or torch.equal(part.input_scale, other.input_scale)
            if len(rows):
                assert torch.equal(y.split(counts)[expert], other(rows))


STATIC = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {{scope: per_tensor, dtype: int8, symmetric: False, method: minmax}}
        weight: {{scope: per_channel, dtype: int8, symmetric: True, method: minmax}}
      include: ["*experts*"]
  save:
    - type: ascendv1_saver
  experts: {policy}
  dataset: {dataset}
"""


@pytest.mark.parametrize("policy", ["fallback", "all"])
def test_static_scales_of_experts_are_finite_whatever_the_router_does(
    policy: str, tiny_moe: Path, protocol: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('"a"\n')
    config = protocol(STATIC.format(policy=policy, dataset=tmp_path / "one.jsonl"))
    report = quantize(tiny_moe, tmp_path / "out", config, device="cpu")
    seen = report["units"][0]["experts"]["model.layers.0.mlp.experts"]["tokens"]
    assert (len(seen), sum(seen)) == (4, 2 * report["units"][0]["tokens"])
    unseen = [number for number, tokens in enumerate(seen) if not tokens]
    assert unseen
    expected = {
        f"model.layers.0.mlp.experts.{number}.{part}" for number in unseen for part in ("gate_up_proj", "down_proj")
    }
    assert set(report["units"][0]["borrowed"]) == (expected if policy == "fallback" else set())
    tensors = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == 2 * 4 * 3
    assert all(tensor.isfinite().all() and tensor > 0 for tensor in scales.values())


def test_a_run_that_wants_every_expert_seen_stops_at_the_first_that_is_not(
    tiny_moe: Path, protocol: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('"a"\n')
    config = protocol(STATIC.format(policy="route", dataset=tmp_path / "one.jsonl"))
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.mlp\.experts\.\d\.gate_up_proj: no calibration"):
        quantize(tiny_moe, tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out").exists()
