# SPDX-License-Identifier: Apache-2.0
"""What a calibration pass measures, against the same tokens looked at as a whole in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from modelslim.row_sample import RowSample
from modelslim.statistics import ChannelAbsMean, ChannelEnergy, ChannelRange, Gram, Statistic, TensorRange, TokenCount
from modelslim.unit_statistics import UnitStatistics, follows_rescaling

CHANNELS = 12
KINDS: tuple[type[Statistic], ...] = (
    ChannelAbsMean,
    ChannelEnergy,
    ChannelRange,
    Gram,
    RowSample,
    TensorRange,
    TokenCount,
)
S = TypeVar("S", bound=Statistic)


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated channels of different sizes, off centre."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, CHANNELS, generator=generator) @ torch.randn(CHANNELS, CHANNELS, generator=generator)
    return (mixed * torch.logspace(-1, 1, CHANNELS) + 0.5).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches of different lengths, one of them empty."""
    return [tokens(count, seed, dtype) for seed, count in enumerate((5, 1, 0, 17, 9))]


def observed(kind: type[S], parts: Sequence[Tensor]) -> S:
    statistic = kind()
    for part in parts:
        statistic.update(part)
    return statistic


def merged(kind: type[S], parts: Sequence[Tensor]) -> S:
    """Two instances that saw a part each, one that saw nothing, reduced to one."""
    statistic = kind()
    for other in (observed(kind, parts[3:]), kind(), observed(kind, parts[:3])):
        statistic.merge(other)
    return statistic


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def parts(request: pytest.FixtureRequest) -> list[Tensor]:
    return batches(request.param)


@pytest.fixture(params=["one", "merged"])
def how(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def measure(kind: type[S], parts: Sequence[Tensor], how: str) -> S:
    return merged(kind, parts) if how == "merged" else observed(kind, parts)


SCALE = torch.linspace(0.25, 3, CHANNELS)
SHIFT = torch.linspace(-2, 5, CHANNELS)


def scaled(parts: Sequence[Tensor], shift: Tensor | None) -> Tensor:
    """All tokens after the rescaling, in double precision."""
    x = torch.cat(list(parts)).double()
    return (x - (0 if shift is None else shift.double())) / SCALE.double()


def present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_tokens_are_counted(parts: list[Tensor], how: str) -> None:
    assert measure(TokenCount, parts, how).tokens == 32


def test_range_of_the_whole_is_exact(parts: list[Tensor], how: str) -> None:
    found, x = measure(TensorRange, parts, how), torch.cat(parts)
    assert torch.equal(present(found.minimum), x.min())
    assert torch.equal(present(found.maximum), x.max())


def test_ranges_of_channels_are_exact(parts: list[Tensor], how: str) -> None:
    found, x = measure(ChannelRange, parts, how), torch.cat(parts)
    assert torch.equal(present(found.minimum), x.amin(0))
    assert torch.equal(present(found.maximum), x.amax(0))
    assert torch.equal(present(found.whole().minimum), x.min())
    assert torch.equal(present(found.whole().maximum), x.max())


def test_channel_of_a_nan_has_no_range() -> None:
    x = tokens(6)
    x[2, 3] = torch.nan
    found = observed(ChannelRange, [x[:1], x[1:4], x[4:]])
    for bound in (present(found.minimum), present(found.maximum)):
        assert bound.isnan().nonzero().flatten().tolist() == [3]
    assert present(found.whole().maximum).isnan()


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "shift"])
def test_ranges_of_channels_follow_a_rescaling(how: str, shift: Tensor | None) -> None:
    parts = batches()
    found, x = measure(ChannelRange, parts, how).rescaled(SCALE, shift), scaled(parts, shift)
    torch.testing.assert_close(present(found.minimum).double(), x.amin(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(present(found.maximum).double(), x.amax(0), rtol=1e-5, atol=1e-5)


def test_mean_magnitude_of_channels(parts: list[Tensor], how: str) -> None:
    found, x = measure(ChannelAbsMean, parts, how), torch.cat(parts).double()
    assert found.tokens == 32
    assert found.mean.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), x.abs().mean(0), rtol=1e-6, atol=0)


def test_mean_magnitude_follows_a_scale_and_refuses_a_shift(how: str) -> None:
    parts = batches()
    found = measure(ChannelAbsMean, parts, how)
    torch.testing.assert_close(
        found.rescaled(SCALE).mean.double(), scaled(parts, None).abs().mean(0), rtol=1e-5, atol=0
    )
    with pytest.raises(TypeError, match="shift"):
        found.rescaled(SCALE, SHIFT)


def test_mean_magnitude_of_many_small_batches_loses_nothing() -> None:
    """A running sum in float32 stops growing when it is large enough."""
    found = ChannelAbsMean()
    for _ in range(3):
        found.update(torch.full((1 << 16, 1), 256.0))
    found.update(torch.full((1, 1), 1e-3))
    assert float(present(found.total)) == pytest.approx(3 * 2**24 + 1e-3, abs=1e-6)


def test_energy_of_channels_is_the_sum_of_squares(parts: list[Tensor], how: str) -> None:
    found, x = measure(ChannelEnergy, parts, how), torch.cat(parts).double()
    assert found.tokens == 32
    torch.testing.assert_close(present(found.squares), x.square().sum(0), rtol=1e-6, atol=0)
    close(present(found.total), x.sum(0))


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "shift"])
def test_energy_of_channels_follows_a_rescaling(how: str, shift: Tensor | None) -> None:
    parts = batches()
    found, x = measure(ChannelEnergy, parts, how).rescaled(SCALE, shift), scaled(parts, shift)
    assert found.tokens == 32
    close(present(found.squares), x.square().sum(0))
    close(present(found.total), x.sum(0))
    close(present(found.rescaled(SCALE).squares), (x / SCALE).square().sum(0))


def test_gram_matrix_is_the_sum_of_outer_products(parts: list[Tensor], how: str) -> None:
    found, x = measure(Gram, parts, how), torch.cat(parts).double()
    assert found.tokens == 32
    assert present(found.matrix).dtype == torch.float32
    close(present(found.matrix), sum((torch.outer(row, row) for row in x), torch.zeros(CHANNELS, CHANNELS).double()))
    close(present(found.total), x.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_matrix_of_long_batches_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Also where products are made on units for bfloat16, which is for activations in bfloat16 alone."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(700, 256, generator=generator).to(dtype) for _ in range(3)]
    x = torch.cat(parts).double()
    error = present(observed(Gram, parts).matrix).double() - x.t() @ x
    assert error.abs().max() < 3e-3  # bfloat16 alone would be off by 8 on the diagonal
    other = torch.randn(64, 64, generator=generator)
    assert (other @ other - other.double() @ other.double()).abs().max() < 1e-4  # as before


def test_gram_matrix_of_many_channels_is_symmetric_and_whole(how: str) -> None:
    """It is summed in pieces, and only on one side of the diagonal."""
    parts = [torch.randn(20, 1100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found, x = measure(Gram, parts, how), torch.cat(parts).double()
    matrix = present(found.matrix)
    assert torch.equal(matrix, matrix.t())
    close(matrix, x.t() @ x)
    found.update(parts[0])
    close(present(found.matrix), x.t() @ x + parts[0].double().t() @ parts[0].double())


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal to float32, measured by the largest number: sums of other signs cancel."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "shift"])
def test_gram_matrix_follows_a_rescaling(how: str, shift: Tensor | None) -> None:
    parts = batches()
    found, x = measure(Gram, parts, how).rescaled(SCALE, shift), scaled(parts, shift)
    assert found.tokens == 32
    close(present(found.matrix), x.t() @ x)
    close(present(found.total), x.sum(0))
    again = found.rescaled(SCALE)
    close(present(again.matrix), (x / SCALE).t() @ (x / SCALE))


def test_row_sample_keeps_all_tokens_while_there_is_room(parts: list[Tensor]) -> None:
    assert torch.equal(present(observed(RowSample, parts).rows), torch.cat(parts))


@pytest.mark.parametrize("lengths", [[256], [257], [1] * 300, [100] * 40, [3, 700, 1, 1, 50, 9], [5000]], ids=str)
def test_row_sample_is_spread_evenly_over_all_tokens(lengths: list[int]) -> None:
    total = sum(lengths)
    every = torch.arange(total, dtype=torch.float32).view(-1, 1)
    rows = present(observed(RowSample, every.split(lengths)).rows).flatten()
    assert len(rows) == min(total, RowSample.capacity)
    gaps = torch.cat([torch.tensor([-1.0]), rows, torch.tensor([float(total)])]).diff()
    assert gaps.min() >= 1 and gaps.max() <= 3 * total / len(rows)  # in the order in which they came
    assert torch.equal(rows, present(observed(RowSample, [every]).rows).flatten())  # however they are batched


def test_row_sample_does_not_favour_the_first_token_of_texts_whose_lengths_are_powers_of_two() -> None:
    every = (torch.arange(128 * 512) % 512).float().view(-1, 1)
    rows = present(observed(RowSample, every.split(4096)).rows)
    assert int((rows == 0).sum()) <= 2


def numbered(group: int, length: int) -> Tensor:
    return torch.arange(length).view(-1, 1) + 10_000.0 * group


@pytest.mark.parametrize("lengths", [[700, 700, 700], [4096] * 9, [3] * 200, [1, 5000, 40, 900], [0, 20, 0]], ids=str)
def test_row_samples_merge_to_the_same_whichever_ranks_hold_them(lengths: list[int]) -> None:
    def sample(group: int) -> RowSample:
        return observed(RowSample, [numbered(group, lengths[group])])

    whole = RowSample()
    for group in range(len(lengths)):
        whole.merge(sample(group))
    rows = present(whole.rows)
    assert len(rows) == min(sum(lengths), RowSample.capacity) == len(rows.unique())
    for group, length in enumerate(lengths):  # each has its share
        share = int(((rows >= 10_000.0 * group) & (rows < 10_000.0 * (group + 1))).sum())
        assert share >= min(length, len(rows) * length // sum(lengths) // 4)
    for ranks in (2, 3):
        held = [[sample(group) for group in range(rank, len(lengths), ranks)] for rank in range(ranks)]
        for samples in held:
            if samples:
                RowSample.condense(samples)
                kept = [len(found) for one in samples if (found := one.rows) is not None]
                assert sum(kept) <= RowSample.capacity + len(lengths)  # those of one key stay together
        shared = RowSample()
        for group in range(len(lengths)):
            shared.merge(held[group % ranks][group // ranks])
        assert torch.equal(present(shared.rows), rows)


def test_row_sample_is_a_copy() -> None:
    x = tokens(5)
    kept = observed(RowSample, [x])
    other = RowSample()
    other.merge(kept)
    before = x.clone()
    x.zero_()
    assert torch.equal(present(kept.rows), before)
    kept.update(tokens(3, 1))
    assert torch.equal(present(other.rows), before)


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "shift"])
def test_row_sample_follows_a_rescaling(how: str, shift: Tensor | None) -> None:
    parts = batches()
    found = measure(RowSample, parts, how)
    order = [*parts[3:], *parts[:3]] if how == "merged" else parts
    rows = present(found.rescaled(SCALE, shift).rows)
    torch.testing.assert_close(rows.double(), scaled(order, shift), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_statistic_that_saw_no_token_can_be_merged_and_rescaled(kind: type[Statistic]) -> None:
    nothing = observed(kind, [torch.zeros(0, CHANNELS)])
    nothing.merge(kind())
    before, after = vars(kind()), vars(nothing)
    assert before == after
    if kind.rescaled is not Statistic.rescaled:
        assert vars(nothing.rescaled(SCALE)) == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_merging_leaves_the_other_alone(kind: type[Statistic]) -> None:
    """A reduction over devices may read it again."""
    one, other = kind(), observed(kind, [tokens(5)])
    one.merge(other)
    before = {name: _copy(value) for name, value in vars(other).items()}
    one.update(tokens(7, 1))
    one.merge(other)
    for name, value in vars(other).items():
        _same(value, before[name])


def _copy(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _same(value: object, other: object) -> None:
    if isinstance(value, Tensor):
        assert isinstance(other, Tensor)
        assert torch.equal(value, other)
    elif isinstance(value, list):
        assert isinstance(other, list)
        assert len(value) == len(other)
        for one, two in zip(value, other, strict=True):
            _same(one, two)
    else:
        assert value == other


def test_count_of_tokens_stays_under_a_rescaling() -> None:
    assert observed(TokenCount, batches()).rescaled(SCALE, SHIFT).tokens == 32


class Own(Statistic):
    """Of a plugin; does not say what a rescaling makes of it."""

    def update(self, x: Tensor) -> None:
        raise NotImplementedError

    def merge(self, other: Statistic) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [TensorRange, Own], ids=lambda kind: kind.__name__)
def test_kinds_that_cannot_follow_a_rescaling_say_so(kind: type[Statistic]) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} does not follow"):
        kind().rescaled(SCALE)


def test_engine_knows_which_kinds_follow() -> None:
    assert {kind: follows_rescaling(kind) for kind in (*KINDS, Own)} == {
        ChannelAbsMean: True,
        ChannelEnergy: True,
        ChannelRange: True,
        Gram: True,
        RowSample: True,
        TensorRange: True,  # by way of the ranges of channels
        TokenCount: True,
        Own: False,
    }


def test_unit_tells_the_range_of_the_whole_from_those_of_the_channels() -> None:
    parts = batches()
    ranges = observed(ChannelRange, parts)
    statistics = UnitStatistics({"q": {ChannelRange: ranges}, "k": {Gram: observed(Gram, parts)}})
    assert torch.equal(present(statistics.get("q", TensorRange).maximum), torch.cat(parts).max())
    with pytest.raises(KeyError):
        statistics.get("k", TensorRange)
    with pytest.raises(KeyError):
        statistics.get("q", Gram)


def test_rescaled_linears_of_one_port_share_what_followed() -> None:
    parts = batches()
    port = {ChannelRange: observed(ChannelRange, parts), Gram: observed(Gram, parts)}
    statistics = UnitStatistics({"q": port, "k": port, "o": dict(port)})
    assert statistics.shares_port("q", "k")
    assert not statistics.shares_port("q", "o")
    statistics.rescale(["q", "k", "router"], SCALE, SHIFT)
    assert statistics.shares_port("q", "k")
    assert statistics.get("q", Gram) is statistics.get("k", Gram)
    x = scaled(parts, SHIFT)
    close(present(statistics.get("q", Gram).matrix), x.t() @ x)
    assert float(present(statistics.get("k", TensorRange).maximum)) == pytest.approx(float(x.max()), rel=1e-5)
    close(present(statistics.get("o", Gram).matrix), torch.cat(parts).double().t() @ torch.cat(parts).double())


def test_experts_are_rescaled_together_or_each_by_its_own() -> None:
    seen = [[tokens(6, seed)] for seed in range(3)]
    for scale in (SCALE, torch.stack([SCALE, SCALE * 2, SCALE * 3])):
        statistics = UnitStatistics({}, {"experts": [{Gram: observed(Gram, parts)} for parts in seen]})
        statistics.rescale(["experts"], scale)
        for index, (found, parts) in enumerate(zip(statistics.get_experts("experts", Gram), seen, strict=True)):
            x = parts[0].double() / (scale if scale.dim() == 1 else scale[index]).double()
            close(present(found.matrix), x.t() @ x)


@pytest.mark.parametrize("shared", [True, False])
def test_unit_of_two_devices_is_reduced_to_one(shared: bool) -> None:
    """A port that linears share is reduced once."""
    parts = batches()

    def seen(some: Sequence[Tensor]) -> UnitStatistics:
        port = {Gram: observed(Gram, some), TokenCount: observed(TokenCount, some)}
        other = port if shared else {kind: observed(kind, some) for kind in (Gram, TokenCount)}
        return UnitStatistics({"q": port, "k": other}, {"experts": [{Gram: observed(Gram, some)}, {Gram: Gram()}]})

    statistics = seen(parts[:2])
    statistics.merge(seen(parts[2:]))
    x = torch.cat(parts).double()
    assert statistics.shares_port("q", "k") is shared
    for name in ("q", "k"):
        assert statistics.get(name, TokenCount).tokens == len(x)
        close(present(statistics.get(name, Gram).matrix), x.t() @ x)
    reached, unreached = statistics.get_experts("experts", Gram)
    close(present(reached.matrix), x.t() @ x)
    assert unreached.matrix is None


def test_linears_of_one_input_are_found_together_and_those_not_measured_alone() -> None:
    one, other = ({TokenCount: TokenCount()} for _ in range(2))
    statistics = UnitStatistics({"q": one, "o": other, "k": one})
    assert statistics.by_input(["k", "free", "o", "q", "loose"]) == [["k", "q"], ["free"], ["o"], ["loose"]]
