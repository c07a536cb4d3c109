# SPDX-License-Identifier: Apache-2.0
"""Whole layers: the function stays, the statistics follow, and what cannot be done is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.api import (
    Algorithm,
    CapabilityError,
    ChannelAbsMean,
    ChannelRange,
    ExpertLinear,
    QuantizationError,
    RowSample,
    Statistic,
    Subgraph,
    UnitStatistics,
)
from modelslim_smoothing.awq import Awq
from modelslim_smoothing.flex import FlexAwqSsz, FlexSmoothQuant
from modelslim_smoothing.smooth import IterSmooth, SmoothQuant

W8A8 = {"act": {"scope": "per_tensor"}, "weight": {"dtype": "int8"}}
W4 = {"dtype": "int4", "scope": "per_group", "group_size": 8}
ENTRIES: Mapping[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "smooth_quant": (SmoothQuant, {}),
    "iter_smooth": (IterSmooth, {}),
    "flex_smooth_quant": (FlexSmoothQuant, {}),
    "flex_smooth_quant static": (FlexSmoothQuant, {"qconfig": W8A8}),
    "flex_awq_ssz": (FlexAwqSsz, {"qconfig": {"weight": {"dtype": "int4", "method": "ssz"}}}),
    "awq": (Awq, {"weight_qconfig": W4}),
}
LAYERS: Mapping[str, dict[str, Any]] = {
    "dense": {},
    "one kv head": {"kv_heads": 1},
    "all kv heads": {"kv_heads": 8},
    "layer norm": {"norm": "layer"},
    "unit offset": {"norm": "offset"},
    "experts": {"experts": 4},
    "experts, layer norm": {"experts": 4, "norm": "layer"},
}
LAYER = "model.layers.0"
Make = Callable[..., Any]


def make(name: str, **more: Any) -> Algorithm:
    kind, config = ENTRIES[name]
    return kind.from_config({"type": name.split()[0], **config, **more})


def state(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{LAYER}.{name}": one.clone() for name, one in layer.named_parameters()}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ENTRIES)
def test_function_stays_and_exactly_what_was_announced_changes(toy: Make, name: str, layer: dict[str, Any]) -> None:
    one = toy(**layer)
    expected, before = one.layer(one.x), state(one.layer)
    algorithm = make(name)
    announced = algorithm.edits(one.unit)
    one.apply(algorithm)
    torch.testing.assert_close(one.layer(one.x), expected, rtol=1e-6, atol=1e-6)
    after = state(one.layer)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed <= announced <= after.keys()
    assert algorithm.edits(one.unit) == announced
    # What is announced and stays is what a search left at 1; a formula leaves nothing.
    assert not name.startswith(("iter", "smooth")) or changed == announced


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ENTRIES)
def test_statistics_follow(toy: Make, name: str, layer: dict[str, Any]) -> None:
    """Those that were rescaled are what a new pass measures."""
    one = toy(**layer)
    algorithm = make(name)
    kinds: tuple[type[Statistic], ...] = (ChannelRange, ChannelAbsMean, RowSample)
    followed = one.apply(algorithm, *kinds)
    anew = one.measure(algorithm, *kinds)
    for port in algorithm.needs(one.unit):
        fused = isinstance(one.unit.modules[port], ExpertLinear)
        for kind in kinds:
            get: Any = UnitStatistics.get_experts if fused else UnitStatistics.get
            found, wanted = (values(get(statistics, port, kind)) for statistics in (followed, anew))
            assert len(found) == len(wanted) > 0
            for got, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


def values(measured: Statistic | list[Statistic]) -> list[Tensor]:
    """What statistics say; nothing of experts that saw no token."""
    found: list[Tensor | None] = []
    for one in measured if isinstance(measured, list) else [measured]:
        if isinstance(one, ChannelRange):
            found += [one.minimum, one.maximum]
        if isinstance(one, ChannelAbsMean) and one.tokens:
            found.append(one.mean)
        if isinstance(one, RowSample):
            found.append(one.rows)
    return [value for value in found if value is not None]


def test_formula_of_iter_smooth_in_every_subgraph(toy: Make) -> None:
    """Up-down first, then ov, then the norms, whose readers have changed by then; loops in float64."""
    one = toy(dtype=torch.float64)
    weights = {name: value.clone() for name, value in state(one.layer).items()}
    algorithm = make("iter_smooth", alpha=0.7)
    ranges = one.measure(algorithm)
    one.apply(algorithm)

    def scales(port: str, readers: list[str]) -> list[float]:
        measured = ranges.get(f"{LAYER}.{port}", ChannelRange)
        assert measured.minimum is not None and measured.maximum is not None
        found = []
        for channel, (low, high) in enumerate(zip(measured.minimum.tolist(), measured.maximum.tolist(), strict=True)):
            a = max(abs(low), abs(high))
            w = max(abs(float(value)) for name in readers for value in weights[f"{LAYER}.{name}.weight"][:, channel])
            found.append(max(a**0.7 / max(w, 1e-5) ** 0.3, 1e-5) if a else 1.0)
        return found

    def divide(name: str, s: Tensor) -> None:
        for part in ("weight", "bias"):
            if (key := f"{LAYER}.{name}.{part}") in weights:
                weights[key] /= s.view(-1, *[1] * (weights[key].dim() - 1))

    down = torch.tensor(scales("mlp.down_proj", ["mlp.down_proj"]), dtype=torch.float64)
    divide("mlp.up_proj", down)
    weights[f"{LAYER}.mlp.down_proj.weight"] *= down
    output = torch.tensor(scales("self_attn.o_proj", ["self_attn.o_proj"]), dtype=torch.float64)
    shared = output.view(2, 4, 4).mean(1)  # 8 heads of 4 channels on 2 key/value heads
    divide("self_attn.v_proj", shared.flatten())
    weights[f"{LAYER}.self_attn.o_proj.weight"] *= shared.repeat_interleave(4, 0).flatten()
    for norm, readers in (
        ("input_layernorm", [f"self_attn.{part}_proj" for part in "qkv"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        s = torch.tensor(scales(readers[0], readers), dtype=torch.float64)
        divide(norm, s)
        for name in readers:
            weights[f"{LAYER}.{name}.weight"] *= s
    for name, value in state(one.layer).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-9)


def test_smooth_quant_is_behind_norms_alone_at_one_half(toy: Make) -> None:
    quant, same = toy(), toy()
    quant.apply(make("smooth_quant"))
    same.apply(make("iter_smooth", alpha=0.5, enable_subgraph_type=["norm-linear"]))
    for name, value in state(quant.layer).items():
        assert torch.equal(value, state(same.layer)[name]), name


@pytest.mark.parametrize("name", ["smooth_quant", "iter_smooth"])
@pytest.mark.parametrize("layer", [{}, {"norm": "layer"}, {"bias": False}, {"norm": "layer", "bias": False}], ids=str)
def test_shift_centres_channels_and_leaves_the_function(toy: Make, name: str, layer: dict[str, Any]) -> None:
    one = toy(**layer)
    expected = one.layer(one.x)
    algorithm = make(name, symmetric=False)
    before = one.measure(algorithm)
    announced = algorithm.edits(one.unit)
    classes = {key: type(module) for key, module in one.layer.named_modules()}
    one.apply(algorithm)
    assert {key: type(module) for key, module in one.layer.named_modules()} == classes
    torch.testing.assert_close(one.layer(one.x), expected, rtol=1e-5, atol=1e-6)
    assert {f"{LAYER}.{norm}.bias" for norm in ("input_layernorm", "post_attention_layernorm")} <= announced
    assert announced <= state(one.layer).keys()
    anew = one.measure(algorithm)
    for port in (f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate_proj"):
        old, new = (statistics.get(port, ChannelRange) for statistics in (before, anew))
        assert float((old.maximum + old.minimum).abs().max()) > 1
        torch.testing.assert_close(new.maximum, -new.minimum, rtol=1e-4, atol=1e-5)


def test_shift_is_refused_where_a_router_or_experts_read(toy: Make) -> None:
    one = toy(experts=4)
    algorithm = make("iter_smooth", symmetric=False)
    with pytest.raises(CapabilityError, match=r"adds a bias to all that reads model\.layers\.0\.post_attention"):
        algorithm.edits(one.unit)
    elsewhere = make("iter_smooth", symmetric=False, exclude=["*experts*"])
    elsewhere.select(one.infos)
    assert f"{LAYER}.input_layernorm.bias" in elsewhere.edits(one.unit)


SEARCHED = [name for name in ENTRIES if name != "smooth_quant"]  # which knows norms alone
UNFUSED: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one": ({}, ("self_attn.o_proj",)),
    "several": ({}, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "experts": ({"experts": 4}, ("mlp.experts.down_proj",)),
    "experts behind a norm": ({"experts": 4}, ("mlp.experts.gate_up_proj",)),
}


def unfused(one: Any, targets: tuple[str, ...]) -> Any:
    """The toy with one subgraph, whose producer cannot be divided."""
    subgraph = Subgraph("non-fusion", "", tuple(f"{LAYER}.{name}" for name in targets))
    one.subgraphs = (subgraph,)
    return one


@pytest.mark.parametrize(("layer", "targets"), UNFUSED.values(), ids=UNFUSED)
@pytest.mark.parametrize("name", SEARCHED)
def test_non_fusion_changes_the_targets_and_their_inputs_alone(
    toy: Make, name: str, layer: dict[str, Any], targets: tuple[str, ...]
) -> None:
    one = unfused(toy(**layer), targets)
    expected, before = one.layer(one.x), state(one.layer)
    algorithm = make(name, enable_subgraph_type=["non-fusion"])
    names = {f"{LAYER}.{target}" for target in targets}
    assert algorithm.multiplies_inputs(one.unit) == names
    assert algorithm.edits(one.unit) == {f"{target}.weight" for target in names}
    followed = one.apply(algorithm, ChannelRange)
    torch.testing.assert_close(one.layer(one.x), expected, rtol=1e-6, atol=1e-6)
    changed = {key for key, value in state(one.layer).items() if not torch.equal(value, before[key])}
    assert changed == algorithm.edits(one.unit)
    anew = one.measure(algorithm, ChannelRange)  # what the linear reads now
    for port in algorithm.needs(one.unit):
        get: Any = UnitStatistics.get_experts if "experts" in port else UnitStatistics.get
        for got, want in zip(
            values(get(followed, port, ChannelRange)), values(get(anew, port, ChannelRange)), strict=True
        ):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)


def test_formula_of_non_fusion(toy: Make) -> None:
    """``s = max|x|^alpha / max|W|^(1 - alpha)`` over all targets; weights times s, inputs over s."""
    from modelslim.multipliers import input_multiplier

    one = unfused(toy(), UNFUSED["several"][1])
    weights = [state(one.layer)[f"{LAYER}.{target}.weight"] for target in UNFUSED["several"][1]]
    algorithm = make("iter_smooth", alpha=0.7, enable_subgraph_type=["non-fusion"])
    x = one.layer.input_layernorm(one.x)
    one.apply(algorithm)
    for channel in range(x.shape[1]):
        a, w = float(x[:, channel].abs().max()), max(float(weight[:, channel].abs().max()) for weight in weights)
        s = a**0.7 / max(w, 1e-5) ** 0.3 if a else 1.0
        for target, weight in zip(UNFUSED["several"][1], weights, strict=True):
            linear = one.layer.get_submodule(target)
            multiplier = input_multiplier(linear)
            assert multiplier is not None and float(multiplier[channel]) == pytest.approx(1 / s, rel=1e-5)
            torch.testing.assert_close(linear.weight[:, channel], weight[:, channel] * s, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SEARCHED)
def test_non_fusion_is_off_unless_it_is_asked_for(toy: Make, name: str) -> None:
    one = unfused(toy(), ("self_attn.o_proj",))
    algorithm = make(name)
    assert not algorithm.needs(one.unit) and not algorithm.edits(one.unit)
    assert not algorithm.multiplies_inputs(one.unit)


def test_types_are_those_enabled(toy: Make) -> None:
    unit = toy().unit
    assert make("iter_smooth", enable_subgraph_type=["ov"]).edits(unit) == {
        f"{LAYER}.self_attn.{one}" for one in ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    }
    assert make("iter_smooth", enable_subgraph_type=["up-down"]).needs(unit) == {
        f"{LAYER}.mlp.down_proj": frozenset({ChannelRange})
    }


@pytest.mark.parametrize(
    ("patterns", "ports"),
    [
        ({}, {"self_attn.q_proj", "mlp.gate", "self_attn.o_proj", "mlp.experts.down_proj"}),
        ({"include": ["*self_attn*"]}, {"self_attn.q_proj", "self_attn.o_proj"}),
        ({"include": ["*q_proj"]}, {"self_attn.q_proj"}),
        ({"exclude": ["*v_proj"]}, {"mlp.gate", "self_attn.o_proj", "mlp.experts.down_proj"}),
        ({"exclude": ["*experts*"]}, {"self_attn.q_proj", "self_attn.o_proj"}),
        ({"exclude": ["*experts.*.down_proj"]}, {"self_attn.q_proj", "mlp.gate", "self_attn.o_proj"}),
        ({"include": ["*mlp*"], "exclude": ["*.gate_proj"]}, {"mlp.experts.down_proj"}),
        (
            {"include": None, "exclude": None},
            {"self_attn.q_proj", "mlp.gate", "self_attn.o_proj", "mlp.experts.down_proj"},
        ),
    ],
    ids=str,
)
def test_subgraphs_are_chosen_by_what_reads_their_tensor(toy: Make, patterns: dict[str, Any], ports: set[str]) -> None:
    one = toy(experts=4)
    algorithm = make("iter_smooth", **patterns)
    algorithm.select(one.infos)
    measured = {name.removeprefix(f"{LAYER}.") for name in algorithm.needs(one.unit)}
    assert measured - {"self_attn.k_proj", "self_attn.v_proj"} == ports


def test_patterns_come_with_their_places() -> None:
    algorithm = make("iter_smooth", include=["*", "*a*"], exclude=["*c*"])
    assert list(algorithm.patterns()) == [(("include", 1), "*a*"), (("exclude", 0), "*c*")]


def test_group_size_that_does_not_divide_is_refused(toy: Make) -> None:
    infos = toy().infos
    algorithm = make("awq", weight_qconfig={**W4, "group_size": 16})
    (problem,) = algorithm.check(infos)
    assert problem.message == f"group_size 16 does not divide the 24 inputs of {LAYER}.mlp.down_proj"
    assert problem.path == ("weight_qconfig",)
    assert not make("awq", weight_qconfig={**W4, "group_size": 16}, exclude=["*down_proj"]).check(infos)
    (problem,) = make("flex_awq_ssz", qconfig={"weight": {**W4, "group_size": 16}}).check(infos)
    assert problem.path == ("qconfig",)


def test_range_behind_a_norm_is_that_of_the_router_which_sees_every_token(toy: Make) -> None:
    one = toy(experts=4)
    assert f"{LAYER}.mlp.gate" in make("iter_smooth").needs(one.unit)
    assert f"{LAYER}.mlp.experts.gate_up_proj" not in make("iter_smooth").needs(one.unit)


def test_router_stays_float_and_has_no_say_in_the_scale(toy: Make) -> None:
    one, other = toy(experts=4), toy(experts=4)
    other.layer.mlp.gate.weight[:, 5] *= 1000
    for each in (one, other):
        each.apply(make("iter_smooth", enable_subgraph_type=["norm-linear"]))
    norm = "post_attention_layernorm.weight"
    torch.testing.assert_close(one.layer.state_dict()[norm], other.layer.state_dict()[norm])


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "smooth_quant"])
def test_expert_without_tokens_stays_as_it_is(toy: Make, name: str) -> None:
    one = toy(experts=4)
    one.layer.mlp.gate.weight[3] = 0
    one.layer.mlp.gate.weight[:3] *= 30
    before = one.layer.mlp.experts.down_proj.weight.clone()
    one.apply(make(name, enable_subgraph_type=["up-down"]))
    after = one.layer.mlp.experts.down_proj.weight
    tokens = one.layer.mlp.experts.tokens_seen
    for expert, seen in enumerate(tokens):
        assert seen or torch.equal(after[expert], before[expert])
    assert after.isfinite().all()


@pytest.mark.parametrize("name", ENTRIES)
def test_tensor_that_no_token_reached_is_named(toy: Make, name: str) -> None:
    one = toy(tokens=0)
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.[a-z_.]+: no calibration token reached it"):
        one.apply(make(name))


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite_is_named(toy: Make, name: str, value: float) -> None:
    one = toy()
    one.x[4, 4] = value
    with pytest.raises(QuantizationError, match="its input holds NaN or infinity"):
        one.apply(make(name))


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [{}, {"experts": 4}, {"norm": "layer"}, {"norm": "offset"}], ids=str)
def test_half_precision_stays_itself(toy: Make, name: str, dtype: torch.dtype, layer: dict[str, Any]) -> None:
    """The stored numbers, run in float64, are the old function up to one rounding of every weight."""
    one = toy(dtype=dtype, **layer)
    exact = deepcopy(one.layer).double()
    expected = exact(one.x.double())
    types = {key: (type(module), dict(vars(module)).get("eps")) for key, module in one.layer.named_modules()}
    one.apply(make(name))
    assert {key: (type(module), dict(vars(module)).get("eps")) for key, module in one.layer.named_modules()} == types
    assert all(value.dtype == dtype and value.isfinite().all() for value in state(one.layer).values())
    got = deepcopy(one.layer).double()(one.x.double())
    if not layer.get("experts"):  # rounding may send a token to another expert
        assert float((got - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-4, 100])
def test_float16_does_not_overflow_or_vanish(toy: Make, scale: float) -> None:
    one = toy(dtype=torch.float16)
    for name, value in one.layer.named_parameters():
        if "norm" not in name:
            value.mul_(scale if "o_proj" in name or "down" in name else 1)
    exact = deepcopy(one.layer).double()
    expected = exact(one.x.double())
    one.apply(make("iter_smooth", alpha=0.99))
    assert all(value.isfinite().all() for value in state(one.layer).values())
    got = deepcopy(one.layer).double()(one.x.double())
    assert float((got - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("name", ["flex_smooth_quant", "flex_smooth_quant static", "flex_awq_ssz", "awq"])
@pytest.mark.parametrize("layer", [{}, {"kv_heads": 1}], ids=str)
def test_search_is_not_worse_than_no_smoothing(toy: Make, name: str, layer: dict[str, Any]) -> None:
    """On the tokens that it saw, with the scale that was folded."""
    from modelslim_smoothing.search import errors, trials
    from modelslim_smoothing.site import Site

    one = toy(dtype=torch.float32, **layer)
    algorithm = make(name)
    assert isinstance(algorithm, (FlexSmoothQuant, FlexAwqSsz, Awq))
    statistics = one.measure(algorithm)
    for subgraph in one.unit.subgraphs:
        site = Site.find(one.unit, subgraph)
        scale, shift = algorithm.scale(site, statistics)
        assert shift is None
        (trial,) = trials(site, statistics)
        rounding = algorithm.rounding
        found, plain = errors(
            trial, torch.stack([scale, torch.ones_like(scale)]), rounding.spec, rounding.steps
        ).tolist()
        assert found <= plain * 1.0001, subgraph.type


def test_exponents_that_are_given_are_not_searched(toy: Make) -> None:
    flex, formula = toy(), toy()
    flex.apply(make("flex_smooth_quant", alpha=0.6, beta=0.4))
    formula.apply(make("iter_smooth", alpha=0.6))
    for name, value in state(flex.layer).items():
        torch.testing.assert_close(value, state(formula.layer)[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ENTRIES)
def test_shared_heads_get_one_scale(toy: Make, name: str) -> None:
    if name == "smooth_quant":
        pytest.skip("works behind norms only")
    one = toy(kv_heads=2)
    before = one.layer.self_attn.o_proj.weight.clone()
    one.apply(make(name, enable_subgraph_type=["ov"]))
    ratio = (one.layer.self_attn.o_proj.weight / before)[0].view(2, 4, 4)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(2, 4, 4))
