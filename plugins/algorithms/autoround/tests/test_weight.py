# SPDX-License-Identifier: Apache-2.0
"""The weight in training, its start and its simulated linear, against brute force in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import FLOAT, QuantizedLinear, QuantSpec, TensorSpec
from modelslim_autoround.simulated import InputRounding, SimulatedLinear
from modelslim_autoround.start import RATIOS, best_ratios, factor, moved_values
from modelslim_autoround.weight import TrainedWeight

SPECS = {
    "int4-channel": TensorSpec("int4", "per_channel"),
    "int4-group": TensorSpec("int4", "per_group", group_size=8),
    "int4-group-asymmetric": TensorSpec("int4", "per_group", symmetric=False, group_size=8),
    "int8-channel-asymmetric": TensorSpec("int8", "per_channel", symmetric=False),
    "int3-group": TensorSpec("int3", "per_group", group_size=8),
    "int2-group": TensorSpec("int2", "per_group", group_size=8),
    "int4-group-bfloat16": TensorSpec("int4", "per_group", group_size=16, scale_dtype="bfloat16"),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Round to nearest on the full range, in double precision."""
    groups = weight.double().unflatten(-1, (-1, spec.group_size or weight.shape[-1]))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.qmax
        scale = scale.to(getattr(torch, spec.scale_dtype)).double()
        return ((groups / scale).round().clamp(spec.qmin, spec.qmax) * scale).view(weight.shape)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / (spec.qmax - spec.qmin)
    offset = spec.qmin - (low.clamp(max=0) / scale).round()
    return (((groups / scale).round() + offset).clamp(spec.qmin, spec.qmax) - offset).mul(scale).view(weight.shape)


@specs
def test_without_a_step_it_is_round_to_nearest(spec: TensorSpec) -> None:
    weight = random(24, 32)
    trained = TrainedWeight(weight, spec)
    trained.refresh()
    torch.testing.assert_close(trained.value.detach().double(), nearest(weight, spec), rtol=1e-6, atol=1e-6)
    assert torch.equal(trained.quantized().dequantize(), trained.value.detach())


@specs
def test_steps_go_against_the_sign_of_the_gradient_and_stay_within_half_a_code(spec: TensorSpec) -> None:
    weight, slope = random(24, 32), random(24, 32, seed=1)
    trained = TrainedWeight(weight, spec)
    for _ in range(4):
        trained.refresh()
        (trained.value * slope).sum().backward()
        trained.step(0.2, 0.0)
    expected = -slope.sign().view(trained.offsets.shape) * 0.5  # 0.8, cut off
    assert torch.equal(trained.offsets, expected)
    assert torch.equal(trained.low_ratio, torch.ones_like(trained.low_ratio))
    # Half a code is enough to take the other of the two nearest codes, on which every second weight is already.
    trained.refresh()
    moved = trained.value.detach() - nearest(weight, spec).float()
    assert ((moved * slope) <= 1e-6).all()
    assert 0.4 < (moved.abs() > 1e-3).float().mean() < 0.6
    assert torch.equal(trained.quantized().dequantize(), trained.value.detach())


@specs
def test_ranges_follow_the_gradient_of_a_rounding_that_is_passed_straight(spec: TensorSpec) -> None:
    weight, slope = random(24, 32), random(24, 32, seed=2)
    trained = TrainedWeight(weight, spec)
    groups = trained.low_ratio.shape[1]
    trained.start_at(torch.full((24, groups), 0.8), torch.full((24, groups), 0.7))
    trained.refresh()
    (trained.value * slope).sum().backward()
    before = trained.low_ratio.clone(), trained.high_ratio.clone()
    # The same in double precision, differentiated by autograd.
    values = weight.double().view(24, groups, -1)
    low_ratio, high_ratio = (one.double().requires_grad_() for one in before)
    low, high = values.amin(-1) * low_ratio, values.amax(-1) * high_ratio
    scale, offset = trained.scale()
    held = scale.double().unsqueeze(-1)
    if spec.symmetric:
        exact_scale = torch.maximum(-low, high).unsqueeze(-1) / spec.qmax
        passed = exact_scale + (held - exact_scale).detach()
        steps = values / passed
        steps = (steps + (steps.round() - steps).detach()).clamp(spec.qmin, spec.qmax)
        value = steps * passed
    else:
        assert offset is not None
        passed = (high - low).unsqueeze(-1) / (spec.qmax - spec.qmin)
        passed = passed + (held - passed).detach()
        zero = spec.qmin - low.unsqueeze(-1) / passed
        zero = zero + (offset.unsqueeze(-1) - zero).detach()
        steps = values / passed
        codes = (steps + (steps.round() - steps).detach() + zero).clamp(spec.qmin, spec.qmax)
        value = (codes - zero) * passed
    (value * slope.double().view(value.shape)).sum().backward()
    trained.step(0.0, 0.01)
    assert low_ratio.grad is not None and high_ratio.grad is not None
    if spec.symmetric:
        sign = (low_ratio.grad + high_ratio.grad).sign().float()  # one of both is 0: the other end decides
        assert torch.allclose(trained.low_ratio, before[0] - 0.01 * sign)
        assert torch.allclose(trained.high_ratio, before[1] - 0.01 * sign)
        return
    # The rounding of the offset itself is left out there, which tells where a gradient is next to nothing.
    for found, start, gradient in zip(
        (trained.low_ratio, trained.high_ratio), before, (low_ratio.grad, high_ratio.grad), strict=True
    ):
        clear = gradient.abs() > 0.1 * gradient.abs().mean()
        assert torch.allclose(found[clear], (start - 0.01 * gradient.sign().float())[clear])


@specs
def test_best_range_has_the_least_error_of_the_output(spec: TensorSpec) -> None:
    weight, energy = random(6, 32), random(32, seed=3).square()
    found = best_ratios(weight, spec, energy)
    size = spec.group_size or 32
    for row in range(6):
        for group in range(32 // size):
            part = slice(group * size, (group + 1) * size)
            errors = []
            for ratio in RATIOS:
                one = TrainedWeight(weight[row : row + 1, part], TensorSpec(**{**vars(spec), "group_size": size}))
                one.start_at(torch.full((1, 1), ratio), torch.full((1, 1), ratio))
                one.refresh()
                error = (one.value.detach().double() - weight[row, part].double()).square() * energy[part]
                errors.append(float(error.sum()))
            chosen = errors[min(range(20), key=lambda i: abs(RATIOS[i] - float(found[row, group])))]
            assert chosen <= min(errors) * 1.0001


@pytest.mark.parametrize("spec", [SPECS["int4-channel"], SPECS["int4-group-asymmetric"]], ids=str)
def test_moved_values_are_those_of_gptq(spec: TensorSpec) -> None:
    """Against the inverse of the Hessian, column by column, as the paper has it, in double precision."""
    x, weight = random(200, 32, seed=4) * (torch.arange(32) % 5 + 1), random(12, 32)
    gram = x.t() @ x
    trained = TrainedWeight(weight, spec)
    scale, offset = trained.scale()
    moved = moved_values(weight, factor(gram, "a.b"), scale, offset, spec)
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(32)
    size = spec.group_size or 32
    left = weight.double().clone()
    remaining = sorted(range(32), key=lambda one: -float(gram[one, one]))
    expected = torch.empty(12, 32, dtype=torch.float64)
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        expected[:, column] = left[:, column]
        held = scale[:, column // size].double()
        whole = 0 if offset is None else offset[:, column // size].double()
        code = ((left[:, column] / held).round() + whole).clamp(spec.qmin, spec.qmax)
        error = (left[:, column] - (code - whole) * held) / inverse[0, 0]
        left[:, remaining] -= error.unsqueeze(1) * inverse[0]
        remaining = remaining[1:]
    torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=1e-3)


ACTIVATIONS = {
    "float": FLOAT,
    "static": TensorSpec("int8", "per_tensor"),
    "static-asymmetric": TensorSpec("int8", "per_tensor", symmetric=False),
    "dynamic": TensorSpec("int8", "per_token"),
    "dynamic-asymmetric": TensorSpec("int8", "per_token", symmetric=False),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@specs
def test_simulated_linear_computes_what_the_quantized_one_will(spec: TensorSpec, activation: TensorSpec) -> None:
    linear = nn.Linear(32, 24, bias=False).requires_grad_(False)
    x = random(7, 32, seed=5)
    scale = offset = None
    if activation.scope == "per_tensor" and not activation.is_float:
        scale, offset = torch.tensor([0.02]), torch.tensor([0 if activation.symmetric else 9], dtype=torch.int8)
    trained = TrainedWeight(linear.weight, spec)
    trained.offsets.copy_(random(*trained.offsets.shape, seed=6).clamp(-0.5, 0.5))
    trained.refresh()
    simulated = SimulatedLinear(linear, trained, InputRounding(activation, scale, offset))
    quantized = QuantizedLinear(trained.quantized(), QuantSpec(spec, activation), None, scale, offset)
    found, expected = simulated(x), quantized(x)
    if activation.is_float or spec.scope == "per_group" or not spec.symmetric:
        assert torch.equal(found, expected)
    else:  # summed as integers there
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_straight_through_the_rounding_of_inputs() -> None:
    rounding = InputRounding(ACTIVATIONS["dynamic"])
    x, slope = random(3, 8).requires_grad_(), random(3, 8, seed=7)
    (rounding(x) * slope).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, slope)
