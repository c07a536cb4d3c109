# SPDX-License-Identifier: Apache-2.0
"""Records what every unit of a model is given and gives, and says where two records first differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.open_model import tensors_in


@dataclass(frozen=True)
class Call:
    """One call of a unit.

    Attributes:
        given: copies of the tensors in each argument, by its name; of a switch or a number, itself.
        gave: copies of the tensors in the output.
    """

    given: Mapping[str, Any]
    gave: Sequence[Tensor]


class Recording:
    """The calls of every unit, in the order of the calls. For tiny models: every tensor is copied.

    Args:
        model: the model, whose units are watched from now on.
        units: names of the units.
    """

    def __init__(self, model: nn.Module, units: Sequence[str]) -> None:
        self.calls: dict[str, list[Call]] = {unit: [] for unit in units}
        self.entered = ""
        """The unit that was called last."""
        self.is_inside = False
        """True while that unit computes, and when it failed."""
        for unit in units:
            module: Any = model.get_submodule(unit)
            # In place of the method, which the engine calls without the module's hooks.
            module.forward = self._recorded(unit, module.forward)

    def _recorded(self, unit: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.entered, self.is_inside = unit, True
            given = {name: _copy(value) for name, value in _named(signature, args, kwargs).items()}
            output = forward(*args, **kwargs)
            self.is_inside = False
            self.calls[unit].append(Call(given, _copies(output)))
            return output

        return call


def first_difference(actual: Recording, expected: Recording, is_whole: bool) -> str | None:
    """The first unit, in the order of the visit, that does not give what it should, in words.

    Args:
        actual: what was recorded unit by unit.
        expected: what was recorded in plain calls of the model.
        is_whole: False when ``actual`` ended early, at the unit that it entered last.
    """
    for unit, wanted in expected.calls.items():
        calls = actual.calls.get(unit, [])
        is_last = not is_whole and unit == actual.entered
        # Where it ended early, other samples may not have come as far.
        if len(calls) != len(wanted) and (is_whole or not (calls or is_last)):
            return f"the unit {unit} is called {len(calls)} times, and {len(wanted)} times by the model's own forward"
        for mine, own in zip(calls, wanted, strict=False):
            if what := same_tensors(mine.gave, own.gave):
                names = dict.fromkeys((*own.given, *mine.given))
                others = [name for name in names if _differ(mine.given.get(name), own.given.get(name))]
                causes = f"; of its arguments, {', '.join(others)} differ" if others else ""
                return f"the first unit that differs is {unit}: {what}{causes}"
        if is_last:
            return None
    return None


def same_tensors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Empty when both are the same to the bit, else what differs."""
    shapes, wanted = ([(tuple(one.shape), one.dtype) for one in tensors] for tensors in (actual, expected))
    if shapes != wanted:
        return f"{_shown(actual)} where the model's own forward has {_shown(expected)}"
    for one, other in zip(actual, expected, strict=True):
        if not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            return f"differs by up to {(one.double() - other.double()).abs().max().item():.2g}"
    return ""


def _shown(tensors: Sequence[Tensor]) -> str:
    return " and ".join(f"{one.dtype}{list(one.shape)}".removeprefix("torch.") for one in tensors) or "no tensor"


def _differ(mine: Any, own: Any) -> bool:
    """True when an argument is not the same; None where it was not given or is of no interest."""
    if isinstance(mine, list) or isinstance(own, list):
        return bool(same_tensors(*(value if isinstance(value, list) else [] for value in (mine, own))))
    return bool((mine or None) != (own or None))  # switched off is as good as not given


def _copy(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    return _copies(value) or None


def _copies(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_in(value)]


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, those that the signature collects by the names that they were given."""
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:  # a decorator may take what the function itself does not; else the call fails
        return {**{f"argument {number}": value for number, value in enumerate(args, start=1)}, **kwargs}
    call.apply_defaults()
    bound = call.arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound
