# SPDX-License-Identifier: Apache-2.0
"""The driver: a model's own forward, stopped at every unit, gives what the whole forward gives."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from modelslim.driver import drive
from modelslim.types import ProcessRequest

Drive = Generator[ProcessRequest, Any, Any]


class Chain(nn.Module):
    """Two units, with work before, between and behind them, and a note of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.notes: list[str] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        self.notes.append("begin")
        try:
            y = self.first(x * scale)
            self.notes.append("between")
            return self.second(y.relu()) + y
        except BaseException as error:
            self.notes.append(type(error).__name__)
            raise
        finally:
            self.notes.append("end")

    def units(self) -> list[ProcessRequest]:
        return [ProcessRequest("first", self.first), ProcessRequest("second", self.second)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def llama(tiny_llama: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return model.eval()


def compute(request: ProcessRequest) -> Any:
    return request.module.forward(*request.args, **request.kwargs)


def finish(forward: Drive, request: ProcessRequest) -> tuple[Any, list[str]]:
    """Run a forward that waits at ``request`` to its end: its result, and the units on the way."""
    names = []
    while True:
        names.append(request.name)
        try:
            request = forward.send(compute(request))
        except StopIteration as stop:
            return stop.value, names


def layer_units(model: Any) -> list[ProcessRequest]:
    return [ProcessRequest(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]


def samples(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 512, (1, length), generator=generator) for length in lengths]


def test_unit_by_unit_equals_the_whole_forward_to_the_bit_with_samples_interleaved(llama: Any) -> None:
    inputs = samples((1, 9, 23, 9))
    whole = [llama(input_ids=ids, use_cache=False).logits for ids in inputs]
    units = layer_units(llama)
    forwards = [drive(units, llama, input_ids=ids, use_cache=False) for ids in inputs]
    requests = [next(forward) for forward in forwards]
    for unit in units[:-1]:  # every sample passes a unit before any sample enters the next
        assert [request.name for request in requests] == [unit.name] * len(inputs)
        requests = [
            forward.send(compute(request)) for forward, request in reversed(list(zip(forwards, requests, strict=True)))
        ][::-1]
    results = [finish(forward, request) for forward, request in zip(forwards, requests, strict=True)]
    for (result, _), expected in zip(results, whole, strict=True):
        assert torch.equal(result.logits, expected)


def test_an_answer_of_the_engine_is_what_the_model_goes_on_with(chain: Chain) -> None:
    x = torch.randn(3, 4)
    forward = drive(chain.units(), chain, x, scale=2.0)
    request = next(forward)
    assert request.name == "first" and torch.equal(request.args[0], x * 2.0) and request.kwargs == {}
    answer = torch.randn(3, 4)
    request = forward.send(answer)
    assert request.name == "second" and torch.equal(request.args[0], answer.relu())
    with pytest.raises(StopIteration) as stop:
        forward.send(torch.ones(3, 4))
    assert torch.equal(stop.value.value, answer + 1)


def test_arguments_arrive_as_they_were_given(chain: Chain) -> None:
    class ByName(nn.Module):
        def forward(self, x: Tensor, *rest: Any, flag: bool = False, **more: Any) -> Any:
            return x, rest, flag, more

    unit = ByName()
    x = torch.ones(1)
    forward = drive([ProcessRequest("unit", unit)], lambda: unit(x, 1, 2, flag=True, extra="e"))
    request = next(forward)
    assert request.module is unit
    assert request.args == (x, 1, 2) and request.kwargs == {"flag": True, "extra": "e"}


def test_nothing_runs_before_the_first_unit_is_asked_for(chain: Chain) -> None:
    forward = drive(chain.units(), chain, torch.zeros(1, 4))
    assert chain.notes == []
    forward.close()
    assert chain.notes == []


def test_closing_ends_the_forward_and_runs_its_finally_blocks(chain: Chain) -> None:
    forward = drive(chain.units(), chain, torch.zeros(1, 4))
    next(forward)
    assert chain.notes == ["begin"]
    forward.close()
    assert chain.notes == ["begin", "GreenletExit", "end"]
    with pytest.raises(StopIteration):
        next(forward)


def test_an_exception_inside_the_model_surfaces_with_its_traceback(chain: Chain) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in the model")

    handle = chain.register_forward_hook(fail)
    forward = drive(chain.units(), chain, torch.zeros(1, 4))
    request = forward.send(compute(next(forward)))
    with pytest.raises(ArithmeticError, match="in the model") as caught:
        forward.send(compute(request))
    assert any(entry.name == "fail" for entry in caught.traceback)
    handle.remove()
    with pytest.raises(TypeError):  # before the first unit
        next(drive(chain.units(), chain, None))


def test_an_exception_thrown_into_the_generator_ends_the_forward(chain: Chain) -> None:
    forward = drive(chain.units(), chain, torch.zeros(1, 4))
    next(forward)
    with pytest.raises(KeyError):
        forward.throw(KeyError("engine"))
    assert chain.notes[-1] == "end"


def test_a_failed_forward_leaves_the_others_alone(chain: Chain) -> None:
    x = torch.randn(2, 4)
    expected = chain(x)
    good = drive(chain.units(), chain, x)
    request = next(good)
    bad = drive(chain.units(), chain, x)
    next(bad)
    with pytest.raises(AttributeError):
        bad.send("not a tensor")
    assert torch.equal(finish(good, request)[0], expected)


def test_a_unit_called_outside_a_driven_forward_computes_as_usual(chain: Chain) -> None:
    x = torch.randn(3, 4)
    whole, unit = chain(x), chain.first(x)
    forward = drive(chain.units(), chain, x)
    request = next(forward)
    assert torch.equal(chain.first(x), unit)  # while a forward is suspended
    assert torch.equal(chain(x), whole)
    assert torch.equal(finish(forward, request)[0], whole)
    assert torch.equal(chain(x), whole)  # and behind it


def test_driving_again_and_again_wraps_a_unit_once(chain: Chain) -> None:
    x = torch.zeros(1, 4)
    for _ in range(3):
        forward = drive(chain.units(), chain, x)
        _, names = finish(forward, next(forward))
        assert names == ["first", "second"]
    boundary: Any = chain.first.forward
    closure = inspect.getclosurevars(boundary).nonlocals
    assert closure["original"].__func__ is nn.Linear.forward


def test_a_unit_that_the_forward_calls_twice_comes_twice() -> None:
    unit = nn.Linear(3, 3)
    x = torch.randn(2, 3)

    def forward() -> Any:
        return unit(unit(x))

    expected = forward()
    driven = drive([ProcessRequest("unit", unit)], forward)
    result, names = finish(driven, next(driven))
    assert names == ["unit", "unit"]
    assert torch.equal(result, expected)


def test_a_unit_that_the_forward_leaves_out_does_not_come(chain: Chain) -> None:
    driven = drive(chain.units(), lambda: chain.second(torch.ones(1, 4)))
    assert finish(driven, next(driven))[1] == ["second"]


def test_a_forward_without_a_unit_returns_at_once(chain: Chain) -> None:
    driven = drive(chain.units(), lambda: 42)
    with pytest.raises(StopIteration) as stop:
        next(driven)
    assert stop.value.value == 42


def test_whoever_resumes_a_forward_gets_its_next_unit(chain: Chain) -> None:
    """An engine may itself run in a greenlet."""
    x = torch.randn(2, 4)
    expected = chain(x)
    driven = drive(chain.units(), chain, x)
    request = next(driven)
    received: list[Any] = []
    engine = greenlet(lambda: received.append(driven.send(compute(request))))
    engine.switch()
    assert engine.dead and [following.name for following in received] == ["second"]
    assert torch.equal(finish(driven, received[0])[0], expected)


def test_hooks_on_a_unit_run_once_inside_the_forward(chain: Chain) -> None:
    calls: list[str] = []
    chain.first.register_forward_pre_hook(lambda *_: calls.append("before"))
    chain.first.register_forward_hook(lambda *_: calls.append("behind"))
    forward = drive(chain.units(), chain, torch.zeros(1, 4))
    request = next(forward)
    assert calls == ["before"]
    request = forward.send(compute(request))
    assert calls == ["before", "behind"]
    finish(forward, request)
    assert calls == ["before", "behind"]


@pytest.mark.parametrize("end", [lambda forward: forward.close(), lambda forward: None])
def test_nothing_stays_alive_behind_a_generator_that_is_dropped(chain: Chain, end: Callable[[Drive], None]) -> None:
    class Big:
        """Stands for an activation that the suspended forward holds."""

    held: list[weakref.ref[Big]] = []

    def forward() -> Any:
        big = Big()
        held.append(weakref.ref(big))
        try:
            return chain.first(torch.zeros(1, 4))
        finally:
            chain.notes.append(f"ended with {big is not None}")

    gc.disable()  # reference counting alone must do
    try:
        driven = drive(chain.units(), forward)
        next(driven)
        assert held[0]() is not None
        end(driven)
        del driven
        assert held[0]() is None
    finally:
        gc.enable()
    assert chain.notes == ["ended with True"]


def test_the_arguments_of_a_unit_die_when_the_forward_goes_on(chain: Chain) -> None:
    """Memory holds the activations at one boundary, not those of all units."""

    def forward() -> Any:
        return chain.second(chain.first(torch.zeros(1, 4)))

    driven = drive(chain.units(), forward)
    request = next(driven)
    argument = weakref.ref(request.args[0])
    output = compute(request)
    del request
    following = driven.send(output)
    assert argument() is None
    assert following.name == "second"
    driven.close()


def test_the_driver_switches_no_gradients_off(chain: Chain) -> None:
    with torch.enable_grad():
        driven = drive(chain.units(), chain, torch.zeros(1, 4))
        assert compute(next(driven)).requires_grad
        driven.close()
