# SPDX-License-Identifier: Apache-2.0
"""Statistics of inputs: computed once per port, over all tokens, equal to brute force."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.ports import PortCollector
from modelslim.statistics import Statistic, TensorRange, TokenCount
from modelslim.unit_statistics import UnitStatistics

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Calls(Statistic):
    """How often the engine fed it, and what."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.batches.append(x.clone())

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, Calls)
        self.batches += other.batches


ALL: frozenset[type[Statistic]] = frozenset({Calls, TensorRange, TokenCount})


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return model.eval().float()


def linears_of(llama: Any) -> dict[str, nn.Module]:
    return {
        name.rpartition(".")[2]: module
        for name, module in llama.model.layers[1].named_modules()
        if isinstance(module, nn.Linear)
    }


def run_samples(llama: nn.Module, collector: PortCollector, lengths: tuple[int, ...] = (7, 1, 12)) -> dict[str, Tensor]:
    """Run samples; every linear's inputs by hooks of our own, [all tokens, channels]."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in LINEARS}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, -2).clone()))
        for name, module in linears_of(llama).items()
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), collector:
        for length in lengths:
            llama(torch.randint(0, 512, (1, length), generator=generator))
            collector.next_sample()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(batches) for name, batches in inputs.items()}


def as_range(statistics: UnitStatistics, name: str) -> tuple[float, float]:
    observed = statistics.get(name, TensorRange)
    assert observed.minimum is not None and observed.maximum is not None
    return float(observed.minimum), float(observed.maximum)


def test_linears_that_read_one_tensor_share_one_statistic(llama: nn.Module) -> None:
    collector = PortCollector(linears_of(llama), dict.fromkeys(LINEARS, ALL))
    inputs = run_samples(llama, collector)
    statistics = collector.statistics()
    by_object: dict[int, set[str]] = {}
    for name in LINEARS:
        by_object.setdefault(id(statistics.get(name, TensorRange)), set()).add(name)
    expected = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert list(by_object.values()) == expected
    for name in LINEARS:
        batches = statistics.get(name, Calls).batches
        assert [len(batch) for batch in batches] == [7, 1, 12]  # once per sample, whoever reads it
        assert torch.equal(torch.cat(batches), inputs[name])


def test_ranges_and_counts_equal_brute_force_over_all_tokens(llama: nn.Module) -> None:
    collector = PortCollector(linears_of(llama), dict.fromkeys(LINEARS, ALL))
    inputs = run_samples(llama, collector)
    statistics = collector.statistics()
    for name in LINEARS:
        values = inputs[name].flatten().tolist()
        assert as_range(statistics, name) == (min(values), max(values))
        assert statistics.get(name, TokenCount).tokens == 20


def test_only_what_was_asked_for_is_measured(llama: nn.Module) -> None:
    collector = PortCollector(linears_of(llama), {"k_proj": frozenset({TensorRange})})
    run_samples(llama, collector)
    statistics = collector.statistics()
    as_range(statistics, "k_proj")
    for name, kind in (("k_proj", TokenCount), ("q_proj", TensorRange)):
        with pytest.raises(KeyError):
            statistics.get(name, kind)


def test_a_linear_that_wants_more_than_its_leader_gets_it(llama: nn.Module) -> None:
    needs: Mapping[str, Any] = {
        "q_proj": frozenset({TensorRange}),
        "k_proj": frozenset({TensorRange, TokenCount}),
        "v_proj": frozenset({TokenCount}),
    }
    collector = PortCollector(linears_of(llama), needs)
    run_samples(llama, collector)
    statistics = collector.statistics()
    assert as_range(statistics, "q_proj") == as_range(statistics, "k_proj")
    assert statistics.get("v_proj", TokenCount) is statistics.get("k_proj", TokenCount)
    assert statistics.get("v_proj", TokenCount).tokens == 20


def test_a_linear_that_is_never_called_has_no_range() -> None:
    linears = {"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}
    collector = PortCollector(linears, dict.fromkeys(linears, ALL))
    with collector:
        linears["used"](torch.ones(3, 2))
    idle = collector.statistics().get("idle", TensorRange)
    assert idle.minimum is None and idle.maximum is None
    assert collector.statistics().get("idle", TokenCount).tokens == 0


def test_a_batch_without_tokens_changes_nothing() -> None:
    linear = nn.Linear(2, 2)
    collector = PortCollector({"a": linear}, {"a": ALL})
    with collector:
        linear(torch.empty(0, 2))
    assert collector.statistics().get("a", TensorRange).minimum is None
    with collector:
        linear(torch.tensor([[-1.0, 2.0]]))
        collector.next_sample()
        linear(torch.empty(1, 0, 2))
    assert as_range(collector.statistics(), "a") == (-1, 2)


def test_equal_tensors_that_are_not_the_same_are_two_ports() -> None:
    linears = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    collector = PortCollector(linears, dict.fromkeys(linears, ALL))
    with collector:
        x = torch.ones(1, 2)
        linears["a"](x)
        linears["b"](x.clone())
    statistics = collector.statistics()
    assert statistics.get("a", TensorRange) is not statistics.get("b", TensorRange)


def test_a_tensor_changed_in_place_is_another_input() -> None:
    linears = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    collector = PortCollector(linears, dict.fromkeys(linears, ALL))
    with torch.no_grad(), collector:
        x = torch.ones(1, 2)
        linears["a"](x)
        linears["b"](x.mul_(50))
    assert as_range(collector.statistics(), "a") == (1, 1)
    assert as_range(collector.statistics(), "b") == (50, 50)


def test_a_linear_that_joined_a_port_is_measured_wherever_it_is_called() -> None:
    """As k and v of a layer that attends to text and to an image."""
    linears = {"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}
    collector = PortCollector(linears, dict.fromkeys(linears, ALL))
    with torch.no_grad(), collector:
        text, image = torch.ones(1, 2), torch.full((4, 2), 90.0)
        linears["q"](text)
        linears["k"](text)
        linears["k"](image)
        collector.next_sample()
        linears["k"](torch.full((1, 2), -30.0))  # its leader is not called at all
    assert as_range(collector.statistics(), "k") == (-30, 90)
    assert collector.statistics().get("k", TokenCount).tokens == 6


def test_the_same_tensor_in_the_next_sample_counts_again_and_none_is_kept() -> None:
    linear = nn.Linear(2, 2)
    collector = PortCollector({"a": linear}, {"a": ALL})
    with collector:
        x = torch.ones(3, 2)
        for _ in range(2):
            linear(x)
            collector.next_sample()
        assert collector.statistics().get("a", TokenCount).tokens == 6
        kept = weakref.ref(x)
        del x
        assert kept() is None


def test_a_linear_called_by_keyword_is_measured() -> None:
    linear = nn.Linear(2, 2)
    collector = PortCollector({"a": linear}, {"a": ALL})
    with collector:
        linear(input=torch.tensor([[3.0, 4.0]]))
    assert as_range(collector.statistics(), "a") == (3, 4)


def test_inference_mode_is_measured_too() -> None:
    linear = nn.Linear(2, 2)
    collector = PortCollector({"a": linear}, {"a": ALL})
    with torch.inference_mode(), collector:
        linear(torch.tensor([[3.0, 4.0]]))
    assert as_range(collector.statistics(), "a") == (3, 4)


def test_leaving_the_context_removes_every_hook(llama: nn.Module) -> None:
    collector = PortCollector(linears_of(llama), dict.fromkeys(LINEARS, ALL))
    run_samples(llama, collector)
    before = len(collector.statistics().get("q_proj", Calls).batches)
    with torch.no_grad():
        llama(torch.arange(3)[None])
    assert len(collector.statistics().get("q_proj", Calls).batches) == before
    assert not any(module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_range_is_exact_in_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 6, generator=torch.Generator().manual_seed(5)) * 7).to(dtype)
    observed = TensorRange()
    for part in torch.split(x, 9):
        observed.update(part)
    assert observed.minimum is not None and observed.maximum is not None
    assert observed.minimum.dtype == dtype and observed.minimum.dim() == 0
    values = x.double().flatten().tolist()
    assert (float(observed.minimum), float(observed.maximum)) == (min(values), max(values))


def test_a_merge_equals_a_single_pass_in_any_order() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(6))
    parts = torch.split(x, [1, 30, 9, 20])
    whole, count = TensorRange(), TokenCount()
    for part in parts:
        whole.update(part)
        count.update(part)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged, tokens = TensorRange(), TokenCount()
        for index in order:
            other, more = TensorRange(), TokenCount()
            other.update(parts[index])
            more.update(parts[index])
            merged.merge(other)
            tokens.merge(more)
        merged.merge(TensorRange())  # a worker that saw nothing
        assert merged.minimum == whole.minimum and merged.maximum == whole.maximum
        assert tokens.tokens == count.tokens == 60
    empty = TensorRange()
    empty.merge(TensorRange())
    assert empty.minimum is None


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_among_the_activations_shows_in_the_range(place: int) -> None:
    parts = [torch.ones(2, 3) for _ in range(3)]
    parts[place][1, 2] = nan
    observed, merged = TensorRange(), TensorRange()
    for part in parts:
        observed.update(part)
        other = TensorRange()
        other.update(part)
        merged.merge(other)
    for statistic in (observed, merged):
        assert statistic.minimum is not None and isnan(statistic.minimum)
        assert statistic.maximum is not None and isnan(statistic.maximum)


def test_infinity_shows_in_the_range() -> None:
    observed = TensorRange()
    observed.update(torch.tensor([[1.0, -inf]]))
    observed.update(torch.tensor([[inf, 0.0]]))
    assert observed.minimum == -inf and observed.maximum == inf
