# SPDX-License-Identifier: Apache-2.0
"""Inputs of linears that are multiplied at run time, where no weight in front of them can take a scale.

The weight of such a linear was multiplied by ``s`` along its inputs, and it reads ``x / s``. While it is float,
a hook of the module multiplies; the quantized linear that replaces it holds the multiplier ``1 / s`` itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_input_multiplication"

M = TypeVar("M", bound=nn.Module)


class InputMultiplication:
    """What is done to the input of a linear; linears that share it and their input get the very same product.

    Args:
        multiplier: float32 [in], or [experts, in].
    """

    def __init__(self, multiplier: Tensor) -> None:
        self.multiplier = multiplier
        self._last: tuple[ref[Tensor], int, ref[Tensor]] | None = None

    def apply(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Multiply.

        Args:
            x: [..., in], floating.
            counts: of fused experts, how many tokens each has; those beyond are left alone.

        Returns:
            the product, computed in float32 at least, in the dtype of ``x``.
        """
        version = 0 if x.is_inference() else x._version
        if self._last is not None:
            known, before, product = self._last[0](), self._last[1], self._last[2]()
            if known is x and before == version and product is not None:
                return product
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        multiplied = (wide * self._spread(x, counts)).to(x.dtype)
        self._last = ref(x), version, ref(multiplied)
        return multiplied

    def _spread(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if self.multiplier.dim() == 1:
            return self.multiplier
        repeats = torch.tensor([*counts, len(x) - sum(counts)], device=x.device)
        beyond = torch.ones_like(self.multiplier[:1])
        return torch.cat([self.multiplier, beyond]).repeat_interleave(repeats, 0)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a linear with its input multiplied, as a forward pre-hook."""
        if not args:
            return (), {**kwargs, "input": self.apply(kwargs["input"])}
        x, *rest = args
        return (self.apply(x, *rest[:1]), *rest), kwargs


@torch.no_grad()
def multiply_inputs(linears: Iterable[nn.Module], multiplier: Tensor) -> None:
    """Multiply what linears read from now on, and divide their weights, so that they give what they gave.

    Args:
        linears: ``nn.Linear`` or ``ExpertLinear`` modules that read one tensor.
        multiplier: [in], positive; of fused experts also [experts, in].
    """
    multiplier = multiplier.to(torch.float32)
    shared: dict[tuple[int, ...], InputMultiplication] = {}
    for linear in linears:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        before, shape = _of(linear), (*weight.shape[:-2], weight.shape[-1])
        key = (id(before), *shape)
        if key not in shared:
            total = multiplier if before is None else before.multiplier * multiplier
            shared[key] = InputMultiplication(total.expand(shape))
        _divide(linear, multiplier)
        drop_input_multiplier(linear)
        _install(linear, shared[key])


def input_multiplier(linear: nn.Module) -> Tensor | None:
    """By what the input of a float linear is multiplied, float32 [in] or [experts, in]; None for most."""
    found = _of(linear)
    return None if found is None else found.multiplier


def shared_multipliers(linears: Mapping[str, nn.Module]) -> list[tuple[list[str], Tensor]]:
    """The multipliers of float linears, each with the names of the linears that share the product."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, linear in linears.items():
        found = _of(linear)
        if found is not None:
            groups.setdefault(id(found), ([], found.multiplier))[0].append(name)
    return list(groups.values())


def share_multiplier(linears: Iterable[nn.Module], multiplier: Tensor) -> None:
    """Multiply what linears read whose weights were divided before.

    Args:
        linears: they get the very same product of the very same input.
        multiplier: float32 [in] or [experts, in].
    """
    shared = InputMultiplication(multiplier)
    for linear in linears:
        drop_input_multiplier(linear)
        _install(linear, shared)


def carry_input_multiplier(linear: nn.Module, stand_in: M) -> M:
    """Let a module that stands in for a linear read what the linear reads.

    Args:
        linear: the float linear.
        stand_in: called as the linear is.

    Returns:
        ``stand_in``.
    """
    found = _of(linear)
    if found is not None:
        _install(stand_in, found)
    return stand_in


@torch.no_grad()
def undo_input_multiplier(linear: nn.Module) -> None:
    """Give a linear that stays float its weight and its input back, up to the rounding of the weight."""
    found = _of(linear)
    if found is not None:
        _divide(linear, 1 / found.multiplier)
        drop_input_multiplier(linear)


def drop_input_multiplier(linear: nn.Module) -> None:
    """Forget what is done to the input of a linear."""
    if _of(linear) is not None:
        linear.__dict__.pop(_ATTRIBUTE)[1].remove()


def without_observers(linear: nn.Module) -> Any:
    """What calls a linear of fused experts on its input, multiplied where it is, and passes observers by."""
    found = _of(linear)
    if found is None:
        return linear.forward
    return lambda x, counts: linear.forward(found.apply(x, counts), counts)


def _of(linear: nn.Module) -> InputMultiplication | None:
    held = linear.__dict__.get(_ATTRIBUTE)
    return None if held is None else held[0]


def _install(module: nn.Module, multiplication: InputMultiplication) -> None:
    handle = module.register_forward_pre_hook(multiplication, with_kwargs=True)
    module.__dict__[_ATTRIBUTE] = multiplication, handle


def _divide(linear: nn.Module, divisor: Tensor) -> None:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(wide / (divisor if divisor.dim() == 1 else divisor.unsqueeze(-2)))
