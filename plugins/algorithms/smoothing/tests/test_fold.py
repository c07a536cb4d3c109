# SPDX-License-Identifier: Apache-2.0
"""Folding leaves the function alone, module by module, and rounds once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear
from modelslim_smoothing import fold
from modelslim_smoothing.scales import per_target

SIZE = 24


def random_scale(*shape: int) -> Tensor:
    return torch.exp(torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 2)


def make_norm(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    if kind.startswith("layer"):
        norm: nn.Module = nn.LayerNorm(SIZE, eps=float(kind[5:]))
        norm.bias.copy_(torch.randn(SIZE))  # type: ignore[operator]
    else:
        norm = nn.RMSNorm(SIZE, eps=float(kind[3:]))
    norm.weight.copy_(torch.randn(SIZE))  # type: ignore[operator]
    return norm.requires_grad_(False).to(dtype)


class UnitOffset(nn.Module):
    """``x * (1 + weight)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + self.weight.to(x.dtype))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm())


@pytest.mark.parametrize("kind", ["rms1e-2", "rms1e-12", "layer1e-5", "layer3e-1"])
def test_norm_divided_and_linear_multiplied_is_the_same_function(kind: str) -> None:
    norm, linear = make_norm(kind, torch.float64), nn.Linear(SIZE, 5, dtype=torch.float64)
    x = torch.randn(9, SIZE, dtype=torch.float64) * 3
    y, before, scale = norm(x), linear(norm(x)), random_scale(SIZE)
    held, shift = fold.divide_norm(norm, scale)
    fold.multiply_columns([linear], held)
    assert shift is None
    torch.testing.assert_close(held, scale.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm(x), y / scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["rms1e-2", "layer3e-1"])
def test_class_eps_and_parameters_of_a_norm_stay(kind: str) -> None:
    norm = make_norm(kind, torch.bfloat16)
    before = type(norm), norm.eps, [(name, one.dtype) for name, one in norm.named_parameters()]
    fold.divide_norm(norm, random_scale(SIZE))
    assert (type(norm), norm.eps, [(name, one.dtype) for name, one in norm.named_parameters()]) == before
    assert not norm._forward_hooks


@pytest.mark.parametrize("kind", ["rms1e-2", "layer3e-1"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_shift_behind_a_norm_is_the_same_function_and_divides_the_bias_once(kind: str, has_bias: bool) -> None:
    norm, linear = make_norm(kind, torch.float64), nn.Linear(SIZE, 5, bias=has_bias, dtype=torch.float64)
    x = torch.randn(9, SIZE, dtype=torch.float64)
    y, before = norm(x), linear(norm(x))
    scale, shift = random_scale(SIZE), torch.randn(SIZE, dtype=torch.float64)
    held, moved = fold.divide_norm(norm, scale, shift)
    assert moved is not None
    fold.add_shift([linear], moved)
    fold.multiply_columns([linear], held)
    torch.testing.assert_close(norm(x), (y - shift) / scale, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-10, atol=1e-10)
    assert "bias" in dict(norm.named_parameters()) and "bias" in dict(linear.named_parameters())


def test_second_shift_of_a_norm_that_got_a_bias_adds_up() -> None:
    norm, linear = make_norm("rms1e-2", torch.float64), nn.Linear(SIZE, 5, bias=False, dtype=torch.float64)
    x = torch.randn(9, SIZE, dtype=torch.float64)
    before = linear(norm(x))
    for _ in range(2):
        held, moved = fold.divide_norm(norm, random_scale(SIZE), torch.randn(SIZE, dtype=torch.float64))
        assert moved is not None
        fold.add_shift([linear], moved)
        fold.multiply_columns([linear], held)
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-9, atol=1e-9)
    assert len(norm._forward_hooks) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_readers_get_the_scale_that_a_rounded_norm_divides_by(dtype: torch.dtype) -> None:
    """In float64 on the stored numbers, only the rounding of the weight remains."""
    norm, linear = make_norm("rms1e-2", dtype), nn.Linear(SIZE, 50, bias=False, dtype=dtype).requires_grad_(False)
    gain, weight, scale = norm.weight.double(), linear.weight.double(), random_scale(SIZE)
    held, _ = fold.divide_norm(norm, scale)
    fold.multiply_columns([linear], held)
    assert torch.equal(norm.weight, (gain / scale.double()).to(dtype))
    assert torch.equal(linear.weight, (weight * held.double()).to(dtype))
    product = norm.weight.double() * linear.weight.double()
    assert difference(product, gain * weight) < torch.finfo(dtype).eps / 2
    exact = (norm.weight.double() * held.double() / gain).sub(1).abs()
    assert float(exact.max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gain_of_one_plus_weight(dtype: torch.dtype) -> None:
    weight = (torch.randn(SIZE, generator=torch.Generator().manual_seed(3)) * 0.4).to(dtype)
    norm, linear = UnitOffset(weight.clone()), nn.Linear(SIZE, 40, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(9, SIZE, dtype=torch.float64)
    original = linear.weight.double()
    before = norm(x) @ original.t()
    # bfloat16 has steps of 2^-8 below 1, so a gain of 1 / 30 is held as 8 or 9 of them.
    held, _ = fold.divide_norm(norm, random_scale(SIZE).clamp(0.02, 30), unit_offset=True)
    fold.multiply_columns([linear], held)
    after = norm(x) @ linear.weight.double().t()
    assert difference(after, before) < (1e-12 if dtype == torch.float64 else 2**-8)


def test_gain_of_zero_stays_and_gives_nothing_infinite() -> None:
    norm = make_norm("rms1e-2", torch.bfloat16)
    norm.weight[4] = 0
    held, _ = fold.divide_norm(norm, random_scale(SIZE))
    assert norm.weight[4] == 0
    assert held.isfinite().all() and held[4] == random_scale(SIZE)[4]


def shuffled(count: int, total: int) -> tuple[int, ...]:
    return tuple(torch.randperm(total, generator=torch.Generator().manual_seed(5))[:count].tolist())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, shuffled(SIZE, 60)])
def test_rows_divided_and_columns_multiplied_is_the_same_function(rows: tuple[int, ...] | None, bias: bool) -> None:
    """Rows of a fused qkv or gate_up, in any order."""
    source = nn.Linear(7, SIZE if rows is None else 60, bias=bias, dtype=torch.float64).requires_grad_(False)
    target = nn.Linear(SIZE, 5, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(9, 7, dtype=torch.float64)
    chosen = slice(None) if rows is None else list(rows)
    whole = source(x)
    before, scale = target(whole[:, chosen]), random_scale(SIZE)
    fold.divide_rows(source, scale, rows)
    fold.multiply_columns([target], scale)
    torch.testing.assert_close(source(x)[:, chosen], whole[:, chosen] / scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target(source(x)[:, chosen]), before, rtol=1e-10, atol=1e-10)
    others = sorted(set(range(60)) - set(rows)) if rows is not None else []
    assert torch.equal(source(x)[:, others], whole[:, others])


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (6, 1), (6, 6)])
def test_values_of_a_latent_projection_with_shared_heads(heads: int, kv_heads: int) -> None:
    """kv_b holds key rows and value rows of each head in turn; attention mixes tokens of one head."""
    nope, size = 3, 4
    kv_b = nn.Linear(5, kv_heads * (nope + size), bias=False, dtype=torch.float64).requires_grad_(False)
    output = nn.Linear(heads * size, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    rows = tuple(head * (nope + size) + nope + channel for head in range(kv_heads) for channel in range(size))
    x, mix = torch.randn(9, 5, dtype=torch.float64), torch.rand(heads, 9, 9, dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        both = kv_b(x).view(9, kv_heads, nope + size).transpose(0, 1)
        value = both[..., nope:].repeat_interleave(heads // kv_heads, 0)
        return both[..., :nope], output((mix @ value).transpose(0, 1).reshape(9, -1))

    keys, before = run()
    scale = random_scale(kv_heads * size)
    fold.divide_rows(kv_b, scale, rows)
    fold.multiply_columns([output], per_target(scale, (heads, kv_heads)))
    assert torch.equal(run()[0], keys)
    torch.testing.assert_close(run()[1], before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_have_scales_of_their_own_between_up_and_down(interleaved: bool, bias: bool) -> None:
    experts, inner = 3, 8
    rows = tuple(range(1, 2 * inner, 2)) if interleaved else tuple(range(inner, 2 * inner))
    up = ExpertLinear(experts, 2 * inner, 5, {"up_proj": slice(0, 2 * inner)}, bias=bias, dtype=torch.float64)
    down = ExpertLinear(experts, 6, inner, {"down_proj": slice(None)}, bias=bias, dtype=torch.float64)
    for parameter in (*up.parameters(), *down.parameters()):
        parameter.copy_(torch.randn(parameter.shape))
    x, counts = torch.randn(10, 5, dtype=torch.float64), [4, 0, 6]

    def run() -> Tensor:
        return down(up(x, counts)[:, list(rows)], counts)

    gates = [row for row in range(2 * inner) if row not in rows]
    before, left = run(), up.weight[:, gates].clone()
    scale = random_scale(experts, inner)
    fold.divide_rows(up, scale, rows)
    fold.multiply_columns([down], scale)
    torch.testing.assert_close(run(), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(up.weight[:, gates], left)


def test_experts_behind_a_norm_share_its_scale() -> None:
    bank = ExpertLinear(3, 4, SIZE, {"up_proj": slice(None)}, dtype=torch.float64)
    bank.weight.copy_(torch.randn(bank.weight.shape))
    before, scale = bank.weight.clone(), random_scale(SIZE)
    fold.multiply_columns([bank], scale)
    assert torch.equal(bank.weight, before * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [None, shuffled(SIZE, 60)])
def test_weights_are_rounded_once(dtype: torch.dtype, rows: tuple[int, ...] | None) -> None:
    source = nn.Linear(7, SIZE if rows is None else 60, dtype=dtype).requires_grad_(False)
    target = nn.Linear(SIZE, 9, dtype=dtype).requires_grad_(False)
    scale = random_scale(SIZE)
    chosen = slice(None) if rows is None else list(rows)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    expected = [
        (source.weight[chosen].to(wide) / scale[:, None]).to(dtype),
        (source.bias[chosen].to(wide) / scale).to(dtype),
        (target.weight.to(wide) * scale).to(dtype),
    ]
    fold.divide_rows(source, scale, rows)
    fold.multiply_columns([target], scale)
    for got, want in zip((source.weight[chosen], source.bias[chosen], target.weight), expected, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1.3e-7, atol=0)
        else:
            assert torch.equal(got, want)


def modules() -> list[nn.Module]:
    torch.manual_seed(2)
    bank = ExpertLinear(3, 4, SIZE, {"up_proj": slice(None)}, dtype=torch.bfloat16)
    bank.weight.copy_(torch.randn(bank.weight.shape) - 2)
    linear = nn.Linear(SIZE, 6, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(-torch.rand(6, SIZE) - 1)  # all negative: a maximum without abs would be negative
    return [linear, bank]


def test_columns_are_measured_by_magnitude_over_all_rows_of_all_readers() -> None:
    linear, bank = modules()
    for chosen in ([linear], [bank], [linear, bank]):
        rows: list[Any] = [row for one in chosen for row in one.weight.flatten(0, -2).tolist()]
        expected = [max(abs(row[column]) for row in rows) for column in range(SIZE)]
        assert torch.equal(fold.column_magnitudes(chosen), torch.tensor(expected))


def test_columns_of_experts_are_measured_one_by_one() -> None:
    _, bank = modules()
    expected = [
        [max(abs(row[column]) for row in weight) for column in range(SIZE)]
        for weight in bank.weight.tolist()  # type: ignore[operator]
    ]
    assert torch.equal(fold.column_magnitudes([bank], per_expert=True), torch.tensor(expected))


def test_rows_and_gains_are_measured_by_magnitude() -> None:
    linear, bank = modules()
    rows = (3, 1)
    assert torch.equal(
        fold.row_magnitudes(linear, rows),
        torch.tensor([max(map(abs, linear.weight[row].tolist())) for row in rows]),  # type: ignore[index]
    )
    assert fold.row_magnitudes(bank, rows).shape == (3, 2)
    norm = UnitOffset(torch.tensor([-3.0, 0.5]))
    assert fold.gain_magnitudes(norm, unit_offset=True).tolist() == [2.0, 1.5]
    assert fold.gain_magnitudes(norm, unit_offset=False).tolist() == [3.0, 0.5]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Linear(2, 2), True),
        (lambda: ExpertLinear(2, 2, 2, {"a": slice(None)}), False),
        (lambda: UnitOffset(torch.ones(2)), False),
    ],
)
def test_only_linears_can_take_a_shift(make: Callable[[], nn.Module], expected: bool) -> None:
    assert fold.can_shift(make()) is expected
