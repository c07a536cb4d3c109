# SPDX-License-Identifier: Apache-2.0
"""What is made later, from the stored tensors, is what the same code makes at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from modelslim.api import PluginError, WeightSource
from msmodelslim.bridge.recorder import Recorder

STORED = {
    "a": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    "b": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)).bfloat16(),
}
Read = Callable[[str], Tensor]


def fill_a_linear(read: Read) -> Tensor:
    linear = nn.Linear(6, 4, bias=False)
    linear.load_state_dict({"weight": read("a")})
    return linear.weight


def take_slices(read: Read) -> Tensor:
    stacked = read("b")
    return nn.Parameter(stacked[1, :, 2:].t().contiguous(), requires_grad=False)


def write_in_pieces(read: Read) -> Tensor:
    whole = torch.empty(2, 4, 6, dtype=torch.bfloat16)
    whole[0] = read("b")[2]
    whole[1].copy_(read("b")[0])
    return whole


def change_in_place(read: Read) -> Tensor:
    first = read("a").clone()
    second = first.view(-1)[:6] + 1
    first.mul_(torch.tensor([2.0])).add_(second[0])  # ``second`` is from before
    return torch.cat([first.flatten(), second])


def set_data(read: Read) -> Tensor:
    linear = nn.Linear(4, 4)
    linear.weight.data = read("b").to(torch.float32)[0] @ read("a").t()
    return linear.weight


def a_view(read: Read) -> Tensor:
    return read("b").transpose(1, 2)[1:]


@pytest.mark.parametrize("make", [fill_a_linear, take_slices, write_in_pieces, change_in_place, set_data, a_view])
def test_later_is_as_good_as_now(make: Callable[[Read], Tensor]) -> None:
    with torch.no_grad():
        expected = make(lambda name: STORED[name].clone())
    found, source = record(make)
    assert (found.shape, found.dtype, found.is_meta) == (expected.shape, expected.dtype, True)
    assert source is not None
    tensors = [STORED[key] for key in source.keys]
    before = [tensor.clone() for tensor in tensors]
    made = tensors[0] if source.convert is None else source.convert(tensors)
    assert torch.equal(made, expected)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def record(make: Callable[[Read], Tensor]) -> tuple[Tensor, WeightSource | None]:
    recorder = Recorder()

    def read(name: str) -> Tensor:
        return recorder.stored(WeightSource((name,)), STORED[name])

    with torch.no_grad(), recorder, recorder.factories():
        tensor = make(read)
    return tensor, recorder.source(tensor)


def test_a_plain_copy_needs_no_conversion() -> None:
    _, source = record(fill_a_linear)
    assert source == WeightSource(("a",))


@pytest.mark.parametrize("make", [lambda _: nn.Linear(3, 3).weight, lambda _: torch.empty(3), lambda _: torch.randn(2)])
def test_what_was_never_loaded_has_no_source(make: Callable[[Read], Tensor]) -> None:
    _, source = record(make)
    assert source is None


def test_values_need_no_stored_tensor() -> None:
    recorder = Recorder()
    with torch.no_grad(), recorder, recorder.factories():
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
        table = torch.outer(torch.tensor([1.0, 2.0]), frequencies)
    assert frequencies.is_meta and table.is_meta
    expected = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    assert torch.equal(recorder.compute(frequencies), expected)
    assert torch.equal(recorder.compute(table), torch.outer(torch.tensor([1.0, 2.0]), expected))


def test_a_value_that_needs_a_stored_tensor_is_refused() -> None:
    recorder = Recorder()
    with torch.no_grad(), recorder, recorder.factories():
        doubled = recorder.stored(WeightSource(("a",)), STORED["a"]) * 2
    with pytest.raises(PluginError, match="computed from the stored tensor a"):
        recorder.compute(doubled)


def test_a_tensor_is_rearranged_once_for_all_that_is_cut_out_of_it() -> None:
    recorder, calls = Recorder(), []

    def convert(tensors: list[Tensor]) -> Tensor:
        calls.append(len(tensors))
        return tensors[0].transpose(1, 2).contiguous()

    with torch.no_grad(), recorder, recorder.factories():
        like = torch.empty(3, 6, 4, dtype=torch.bfloat16)
        stacked = nn.Parameter(torch.empty_like(like), requires_grad=False)
        stacked.copy_(recorder.stored(WeightSource(("b",), convert), like))
        cut = [stacked[index].clone() for index in range(3)]
    sources = [recorder.source(tensor) for tensor in cut]
    stored = STORED["b"].clone()
    made: Mapping[int, Tensor] = {
        index: source.convert([stored]) for index, source in enumerate(sources) if source and source.convert
    }
    assert len(made) == 3 and calls == [1]
    for index, tensor in made.items():
        assert torch.equal(tensor, STORED["b"][index].t())
