# SPDX-License-Identifier: Apache-2.0
"""Training of a small unit: less error than round-to-nearest, the unit as it was, the same result again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import (
    ExpertLinear,
    FusedExperts,
    LinearInfo,
    ProcessRequest,
    QuantizationError,
    QuantizedLinear,
    Statistic,
    Unit,
    UnitStatistics,
)
from modelslim_autoround.algorithm import AutoRoundQuant

NAME = "model.layers.0"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As the engine has it."""
    with torch.no_grad():
        yield


class Layer(nn.Module):
    """A residual block with a bias, and experts when asked."""

    def __init__(self, experts: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.experts: nn.Module | None = None
        if experts:
            first, second = (
                ExpertLinear(3, 16, 32, {"up": slice(0, 16)}),
                ExpertLinear(3, 32, 16, {"down": slice(0, 32)}),
            )
            self.experts = FusedExperts({"up": first, "down": second}, torch.tanh)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if not name.startswith("norm"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        x = x + self.down(torch.tanh(self.up(self.norm(x) * scale)))
        if self.experts is not None:
            flat = x.reshape(-1, 32)
            chosen = (torch.arange(len(flat)) % 2).unsqueeze(1)  # the third expert sees nothing
            x = x + self.experts(flat, chosen, torch.ones(len(flat), 1)).view(x.shape)
        return x, None


def calls(layer: Layer, number: int = 4) -> list[ProcessRequest]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(32, 32, generator=generator) * 0.3  # inputs that depend on each other
    return [
        ProcessRequest(
            NAME, layer, (torch.randn(1, 20 + index, 32, generator=generator) @ mixing,), {"scale": torch.ones(32)}
        )
        for index in range(number)
    ]


def unit(layer: Layer, algorithm: AutoRoundQuant, number: int = 4) -> tuple[Unit, UnitStatistics]:
    linears: dict[str, nn.Module] = {
        f"{NAME}.{name}": module
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, ExpertLinear))
    }
    infos = [LinearInfo(name, name, NAME, 32, 16, False, "float32") for name in linears]
    given = calls(layer, number)
    targets = [layer(*call.args, **call.kwargs) for call in given]
    made = Unit(NAME, linears, algorithm.select(infos), module=layer, calls=given, targets=targets)
    return made, measure(algorithm, made)


def measure(algorithm: AutoRoundQuant, made: Unit) -> UnitStatistics:
    """The statistics that the algorithm declares, of the unit's calls."""
    ports: dict[str, dict[type[Statistic], Statistic]] = {}
    experts: dict[str, list[dict[type[Statistic], Statistic]]] = {}
    handles = []
    for name, kinds in algorithm.needs(made).items():
        module = made.linears[name]
        if isinstance(module, ExpertLinear):
            experts[name] = [{kind: kind() for kind in kinds} for _ in range(module.experts)]

            def see(_: nn.Module, args: Any, name: str = name) -> None:
                for port, rows in zip(experts[name], args[0].split(args[1]), strict=True):
                    for statistic in port.values():
                        statistic.update(rows)
        else:
            ports[name] = {kind: kind() for kind in kinds}

            def see(_: nn.Module, args: Any, name: str = name) -> None:
                for statistic in ports[name].values():
                    statistic.update(args[0].flatten(0, -2))

        handles.append(module.register_forward_pre_hook(see))
    for call in made.calls:
        call.module(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return UnitStatistics(ports, experts)


def outputs(layer: Layer, requests: Sequence[ProcessRequest]) -> Tensor:
    return torch.cat([layer(*call.args, **call.kwargs)[0].flatten() for call in requests])


def entry(weight: Mapping[str, Any], act: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    qconfig = {"weight": weight} | ({} if act is None else {"act": act})
    return {"type": "autoround_quant", "strategies": [{"qconfig": qconfig}], **fields}


def quantize(config: Mapping[str, Any], experts: bool = False) -> tuple[Layer, Mapping[str, nn.Module], float]:
    """The layer, what replaces its linears, and the mean squared error of its output with them, on all calls."""
    layer = Layer(experts)
    algorithm = AutoRoundQuant.from_config(config)
    given, statistics = unit(layer, algorithm)
    expected = outputs(layer, given.calls)
    before = {
        name: (id(module), [one.clone() for one in module.parameters()]) for name, module in layer.named_modules()
    }
    modules = algorithm.apply(given, statistics)
    assert modules.keys() == given.specs.keys()
    for name, module in layer.named_modules():
        assert (id(module), all(map(torch.equal, before[name][1], module.parameters()))) == (before[name][0], True)
    assert not any(parameter.grad is not None for parameter in layer.parameters())
    for name, module in modules.items():
        layer.set_submodule(name.removeprefix(f"{NAME}."), module)
    return layer, modules, float((outputs(layer, given.calls) - expected).double().square().mean())


GROUP = {"dtype": "int4", "scope": "per_group", "group_size": 16}
SCHEMES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {
    "W4A16": (GROUP, None),
    "W4A16-asymmetric": (GROUP | {"symmetric": False}, None),
    "W4A8": ({"dtype": "int4"}, {"scope": "per_token"}),
    "W4A8-static": (GROUP, {"scope": "per_tensor"}),
}


@pytest.mark.parametrize("start", ["minmax", "mse", "gptq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_lowers_the_error_of_the_output(scheme: str, start: str) -> None:
    weight, act = SCHEMES[scheme]
    _, _, nearest = quantize(entry(weight, act, iters=0))
    _, modules, trained = quantize(entry(weight, act, iters=40, lr=0.03, start=start, batch_size=4))
    assert trained < 0.7 * nearest
    assert all(isinstance(module, QuantizedLinear) for module in modules.values())


@pytest.mark.parametrize("fields", [{"lr": 1.0}, {"minmax_lr": 1.0, "enable_round_tuning": False}], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_result_is_never_worse_than_round_to_nearest(scheme: str, fields: Mapping[str, Any]) -> None:
    """Steps that are far too long spoil the weights; then the start, or round-to-nearest, is taken."""
    weight, act = SCHEMES[scheme]
    _, _, nearest = quantize(entry(weight, act, iters=0))
    _, _, trained = quantize(entry(weight, act, iters=2, **fields))
    assert trained <= nearest * 1.0001


@pytest.mark.parametrize(
    "fields", [{"iters": 0}, {"enable_round_tuning": False, "enable_minmax_tuning": False}], ids=str
)
def test_without_training_it_is_round_to_nearest_and_nothing_is_measured(fields: Mapping[str, Any]) -> None:
    algorithm = AutoRoundQuant.from_config(entry(GROUP, **fields))
    given, _ = unit(Layer(), algorithm)
    assert algorithm.needs(given) == {}
    for name, module in algorithm.apply(given, UnitStatistics({})).items():
        groups = given.linears[name].weight.unflatten(1, (-1, 16))
        assert isinstance(groups, Tensor) and isinstance(module, QuantizedLinear)
        scale = groups.abs().amax(-1) / 7
        assert torch.equal(module.scale, scale)
        assert torch.equal(module.codes, (groups / scale.unsqueeze(-1)).round().flatten(1).to(torch.int8))


@pytest.mark.parametrize("start", ["minmax", "mse", "gptq"])
def test_output_is_drawn_to_the_targets_where_inputs_carry_errors(start: str) -> None:
    """Inputs that were scaled by earlier units: what makes up for it is nearer to the target than the float unit is."""
    layer = Layer()
    algorithm = AutoRoundQuant.from_config(entry({"dtype": "int8"}, iters=200, lr=0.5, minmax_lr=0.01, start=start))
    given, _ = unit(layer, algorithm)
    wrong = [replace(call, args=(call.args[0] * 1.02,)) for call in given.calls]
    given = replace(given, calls=wrong)
    aimed = torch.cat([target[0].flatten() for target in given.targets])

    def error() -> float:
        return float((outputs(layer, wrong) - aimed).double().square().sum())

    untouched = error()
    for name, module in algorithm.apply(given, measure(algorithm, given)).items():
        layer.set_submodule(name.removeprefix(f"{NAME}."), module)
    assert error() < 0.8 * untouched


def test_as_many_samples_are_wanted_as_are_used() -> None:
    """Ranges of static activations come from all; what does not train replays nothing."""

    def of(act: Mapping[str, Any] | None, **fields: Any) -> tuple[int | None, bool]:
        algorithm = AutoRoundQuant.from_config(entry(GROUP, act, **fields))
        return algorithm.samples, algorithm.replays

    assert of(None, samples=5) == of({"scope": "per_token"}, samples=5) == (5, True)
    assert of({"scope": "per_tensor"}, samples=5) == (None, True)
    assert of(None, iters=0)[1] is False


def test_same_calls_give_the_same_bytes() -> None:
    results = [quantize(entry(GROUP, iters=5))[1] for _ in range(2)]
    for name, module in results[0].items():
        other = results[1][name].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("act", [None, {"scope": "per_token"}], ids=["float", "dynamic"])
def test_fused_experts_are_trained_and_one_without_tokens_is_rounded(act: Mapping[str, Any] | None) -> None:
    _, _, nearest = quantize(entry(GROUP, act, iters=0), experts=True)
    _, modules, trained = quantize(entry(GROUP, act, iters=40, lr=0.03, batch_size=4), experts=True)
    assert trained < 0.7 * nearest
    assert modules[f"{NAME}.experts.down"].codes.shape == (3, 32, 16)


def test_input_that_is_not_finite_is_refused() -> None:
    layer = Layer()
    algorithm = AutoRoundQuant.from_config(entry(GROUP))
    given, statistics = unit(layer, algorithm)
    given.calls[0].args[0][0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"NaN or infinity"):
        algorithm.apply(given, statistics)
    assert type(layer.up) is nn.Linear
