# SPDX-License-Identifier: Apache-2.0
"""Rounding and the errors of a search against loops in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.api import FLOAT, QuantSpec, TensorSpec
from modelslim_smoothing.rounding import round_input, round_weight
from modelslim_smoothing.search import Trial, _trial, errors, exponents, search

WEIGHTS = {
    "int8": TensorSpec("int8", "per_channel"),
    "int4": TensorSpec("int4", "per_channel"),
    "int4 group": TensorSpec("int4", "per_group", group_size=4),
    "int3 group": TensorSpec("int3", "per_group", group_size=4),
    "int2 group offset": TensorSpec("int2", "per_group", symmetric=False, group_size=4),
    "int4 group offset": TensorSpec("int4", "per_group", symmetric=False, group_size=4),
    "float": FLOAT,
}
INPUTS = {
    "dynamic": TensorSpec("int8", "per_token"),
    "static": TensorSpec("int8", "per_tensor", symmetric=False),
    "static symmetric": TensorSpec("int8", "per_tensor"),
    "float": FLOAT,
}


def rounded(values: list[float], low: float, high: float, spec: TensorSpec) -> list[float]:
    """Quantized and dequantized, by the book."""
    if spec.symmetric:
        scale, offset = max(-low, high) / spec.qmax, 0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (spec.qmax - spec.qmin)
        offset = spec.qmin - round(low / scale)
    return [(min(max(round(v / scale) + offset, spec.qmin), spec.qmax) - offset) * scale for v in values]


def weight_by_loop(weight: Tensor, spec: TensorSpec) -> Tensor:
    if spec.is_float:
        return weight.double()
    size = spec.group_size or weight.shape[1]
    rows = []
    for row in weight.double().tolist():
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        rows.append([value for group in groups for value in rounded(group, min(group), max(group), spec)])
    return torch.tensor(rows, dtype=torch.float64)


def input_by_loop(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    if spec.is_float:
        return x.double()
    ends = (float(low.double().min()), float(high.double().max()))
    rows = x.double().tolist()
    return torch.tensor(
        [rounded(row, *((min(row), max(row)) if spec.scope == "per_token" else ends), spec) for row in rows],
        dtype=torch.float64,
    )


def make_trial() -> Trial:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(15, 8, generator=generator) + 0.5
    x[:, 2] *= 20
    weight = torch.randn(5, 8, generator=generator)
    outputs = x @ weight.t()
    # Rows 0 to 2 are one linear, 3 and 4 another.
    first, second = (1 / float(outputs[:, rows].square().sum()) for rows in (slice(0, 3), slice(3, 5)))
    importance = torch.tensor([first] * 3 + [second] * 2)
    # Other tokens of the calibration had a wider range.
    return Trial(x, x.amin(0) * 1.5, x.amax(0) * 1.5, weight, None, outputs, importance)


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_rounded_by_the_book(spec: TensorSpec) -> None:
    weight = make_trial().weight
    torch.testing.assert_close(round_weight(weight, spec).double(), weight_by_loop(weight, spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS)
def test_inputs_are_rounded_by_the_book(spec: TensorSpec) -> None:
    trial = make_trial()
    expected = input_by_loop(trial.x, trial.low, trial.high, spec)
    torch.testing.assert_close(
        round_input(trial.x, trial.low, trial.high, spec).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spec", [WEIGHTS["int4"], WEIGHTS["int4 group"]], ids=str)
def test_least_squares_scales_lower_the_error_of_every_group(spec: TensorSpec) -> None:
    weight = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    size = spec.group_size or 32

    def error(back: Tensor) -> Tensor:
        return (back - weight).view(30, -1, size).square().sum(-1)

    plain, fitted = error(round_weight(weight, spec)), error(round_weight(weight, spec, steps=50))
    assert (fitted <= plain).all()
    assert float(fitted.sum()) < 0.95 * float(plain.sum())


def test_least_squares_step_by_the_book() -> None:
    row = [0.31, -0.9, 0.55, 0.2, -0.05, 0.7]
    scale = 0.9 / 7
    codes = [round(value / scale) for value in row]
    fitted = sum(value * code for value, code in zip(row, codes, strict=True)) / sum(code * code for code in codes)
    expected = [min(max(round(value / fitted), -8), 7) * fitted for value in row]
    got = round_weight(torch.tensor([row]), TensorSpec("int4", "per_channel"), steps=1)
    torch.testing.assert_close(got, torch.tensor([expected]), rtol=1e-6, atol=0)


def test_row_of_zeros_stays_zero() -> None:
    assert torch.equal(round_weight(torch.zeros(2, 8), WEIGHTS["int4"], steps=5), torch.zeros(2, 8))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_errors_are_those_of_rounded_outputs(weights: TensorSpec, inputs: TensorSpec) -> None:
    trial = make_trial()
    scales = torch.exp(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
    expected = []
    for scale in scales:
        weight = weight_by_loop(trial.weight * scale, weights)
        x = input_by_loop(trial.x / scale, trial.low / scale, trial.high / scale, inputs)
        difference = x @ weight.t() - trial.x.double() @ trial.weight.double().t()
        per_linear = (slice(0, 3), slice(3, 5))
        truth = trial.x.double() @ trial.weight.double().t()
        expected.append(
            sum(float(difference[:, one].square().sum() / truth[:, one].square().sum()) for one in per_linear)
        )
    got = errors(trial, scales, QuantSpec(weights, inputs))
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-10)


def test_blocks_of_a_grid_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, spec = make_trial(), QuantSpec(WEIGHTS["int8"], INPUTS["dynamic"])
    scales = torch.exp(torch.randn(7, 8))
    together = errors(trial, scales, spec)
    monkeypatch.setattr("modelslim_smoothing.search._BLOCK", 2 * trial.x.numel())
    torch.testing.assert_close(errors(trial, scales, spec), together, rtol=1e-5, atol=0)


def test_search_adds_up_trials_and_takes_the_last_of_equals() -> None:
    trial, spec = make_trial(), QuantSpec(WEIGHTS["int4"], INPUTS["dynamic"])
    scales = torch.exp(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)))
    alone = errors(trial, scales, spec).double()
    best, total = search([trial, trial], scales, spec)
    torch.testing.assert_close(total, 2 * alone)
    assert best == int(alone.argmin())
    assert search([trial], scales[best].repeat(3, 1), spec)[0] == 2


def test_experts_are_judged_with_their_own_scales() -> None:
    trial, spec = make_trial(), QuantSpec(WEIGHTS["int8"], INPUTS["dynamic"])
    fields: Mapping[str, Any] = vars(trial)
    experts = [Trial(**{**fields, "expert": number}) for number in (0, 2)]
    scales = torch.exp(torch.randn(5, 3, 8))
    expected = errors(trial, scales[:, 0], spec) + errors(trial, scales[:, 2], spec)
    torch.testing.assert_close(search(experts, scales, spec)[1], expected.double())


def test_exponents_stand_in_front_of_a_scale() -> None:
    values = exponents(4, torch.ones(3, 5))
    assert values.shape == (5, 1, 1)
    assert values.flatten().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert exponents(4, torch.ones(3), last=False).flatten().tolist() == [0, 0.25, 0.5, 0.75]


def test_large_linears_are_judged_by_some_outputs_and_tokens() -> None:
    """Evenly spread, so that the error is near that of all."""
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(500, 16, generator=generator), torch.randn(3000, 16, generator=generator)
    low, high, spec = x.amin(0), x.amax(0), QuantSpec(WEIGHTS["int8"], INPUTS["static"])
    part = _trial(x, low, high, [weight, weight[:40]], None)
    assert part.x.shape == (125, 16)
    assert part.weight.shape == (250 + 40, 16)
    outputs = x @ weight.t()
    small = x @ weight[:40].t()
    importance = torch.cat([one.square().sum().reciprocal().expand(one.shape[1]) for one in (outputs, small)])
    whole = Trial(x, low, high, torch.cat([weight, weight[:40]]), None, torch.cat([outputs, small], 1), importance)
    scales = torch.exp(torch.randn(5, 16, generator=generator))
    torch.testing.assert_close(errors(part, scales, spec), errors(whole, scales, spec), rtol=0.15, atol=0)
