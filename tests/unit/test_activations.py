# SPDX-License-Identifier: Apache-2.0
"""Samples that wait at a unit: outputs that are held, units that a sample skips or enters twice, work outside units."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelslim.activations import Boundary
from modelslim.api import ProcessRequest, drive, hookimpl
from modelslim.session import Session

UNITS = ["vision", "layers.0", "layers.1"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Toy(nn.Module):
    """A vision tower that is entered once for each image, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vision = nn.Linear(8, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.between = nn.Linear(8, 8)

    def forward(self, x: Tensor, images: list[Tensor]) -> Tensor:
        for image in images:
            x = x + self.vision(image)
        x = self.layers[0](x)
        x.add_(1)  # code outside units may work in place
        y: Tensor = self.layers[1](self.between(x))
        return y


class ToyAdapter:
    """Yields the units of Toy."""

    @hookimpl
    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        for name in UNITS:
            yield ProcessRequest(name, model.get_submodule(name))

    @hookimpl
    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        return (yield from drive(self.generate_model_visit(model), model, *inputs))


def samples() -> list[tuple[Tensor, list[Tensor]]]:
    """A text, one with an image, one with two."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, 8, generator=generator), [torch.randn(3, 8, generator=generator) for _ in range(images)])
        for images in range(3)
    ]


def spoil(model: Toy, unit: str) -> None:
    """Stands for quantization: the unit computes something else from now on."""
    linear = model.get_submodule(unit)
    assert isinstance(linear, nn.Linear)
    linear.weight.mul_(0.5)


def finish(boundary: Boundary) -> list[Tensor]:
    return [boundary.finish_sample(index, UNITS[-1]) for index in range(3)]


def test_held_outputs_go_on_whatever_the_unit_has_become() -> None:
    model, inputs = Toy(), samples()
    expected = [model(*sample) for sample in inputs]
    boundary = Boundary(Session(ToyAdapter()), model, inputs, UNITS)
    boundary.start()
    boundary.run_unit("vision", lambda: None)
    boundary.measure_unit("layers.0", hold=True)
    assert list(boundary.held) == list(boundary.waiting("layers.0")) == [0, 1, 2]
    spoil(model, "layers.0")
    boundary.run_unit("layers.0", lambda: None)
    assert boundary.held == {}
    for output, wanted in zip(finish(boundary), expected, strict=True):
        assert torch.equal(output, wanted)


def test_measuring_without_holding_computes_again() -> None:
    model, inputs = Toy(), samples()
    boundary = Boundary(Session(ToyAdapter()), model, inputs, UNITS)
    boundary.start()
    boundary.run_unit("vision", lambda: None)
    passed: list[int] = []
    assert boundary.measure_unit("layers.0", lambda: passed.append(1)) == 9
    assert (len(passed), boundary.held) == (3, {})
    spoil(model, "layers.0")
    expected = [model(*sample) for sample in inputs]
    assert boundary.run_unit("layers.0", lambda: None) == 9
    for output, wanted in zip(finish(boundary), expected, strict=True):
        assert torch.equal(output, wanted)


def test_first_entrance_is_held_and_later_ones_are_computed() -> None:
    """The text skips the vision tower, and two images enter it one after the other."""
    model, inputs = Toy(), samples()
    before, after = ([model.vision(image) for image in images] for _, images in inputs[1:])
    boundary = Boundary(Session(ToyAdapter()), model, inputs, UNITS)
    boundary.start()
    boundary.measure_unit("vision", hold=True)
    assert list(boundary.held) == [1, 2]
    assert torch.equal(boundary.held[1], before[0]) and torch.equal(boundary.held[2], after[0])
    spoil(model, "vision")
    assert boundary.run_unit("vision", lambda: None) == 9
    waiting = boundary.waiting("layers.0")
    assert torch.equal(waiting[1].args[0], inputs[1][0] + before[0])
    text, (_, second) = inputs[2]
    assert torch.equal(waiting[2].args[0], text + after[0] + model.vision(second))


def test_two_streams_over_one_model_do_not_mix() -> None:
    """One passes units as they are, one passes them spoilt; both at the same unit, as in a run."""
    model, inputs = Toy(), samples()
    expected = [model(*sample) for sample in inputs]
    session = Session(ToyAdapter())
    boundary, reference = (Boundary(session, model, inputs, UNITS) for _ in range(2))
    boundary.start()
    reference.start()
    for unit in UNITS:
        reference.measure_unit(unit, hold=True)
        if unit != UNITS[-1]:
            reference.run_unit(unit, lambda: None)
        spoil(model, unit)
        if unit != UNITS[-1]:
            boundary.run_unit(unit, lambda: None)
    spoilt = [model(*sample) for sample in inputs]
    for index, wanted in enumerate(expected):
        assert torch.equal(reference.held[index], wanted)
    for output, wanted in zip(finish(boundary), spoilt, strict=True):
        assert torch.equal(output, wanted)
    boundary.close()
    reference.close()


def test_code_outside_units_runs_inside_around() -> None:
    model, inputs = Toy(), samples()
    opened, seen = [False], []
    model.between.register_forward_hook(lambda *_: seen.append(opened[0]))
    model.layers[0].register_forward_hook(lambda *_: seen.append("hooks of units run in the forward"))

    @contextmanager
    def around() -> Iterator[None]:
        opened[0] = True
        yield
        opened[0] = False

    boundary = Boundary(Session(ToyAdapter()), model, inputs, UNITS, around)
    boundary.start()
    for unit in UNITS[:-1]:
        boundary.run_unit(unit, lambda: None)
    assert [one for one in seen if one is not True] == ["hooks of units run in the forward"] * 3
    assert seen.count(True) == 3 and not opened[0]
