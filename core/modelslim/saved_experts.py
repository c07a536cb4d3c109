# SPDX-License-Identifier: Apache-2.0
"""Puts the linears of a layer's experts, which a format stores one by one, together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelslim.errors import ModelError
from modelslim.quantized import QuantizedExperts, QuantizedLinear, QuantizedTensor
from modelslim.saver import SavedLinear


@dataclass(frozen=True)
class SavedExperts:
    """The saved linears that make one stacked weight.

    Attributes:
        linears: [expert][part].
        rows: the rows of each part in an expert's weight.
    """

    linears: Sequence[Sequence[SavedLinear]]
    rows: Sequence[slice]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that hold them."""
        return tuple(name for expert in self.linears for linear in expert for name in linear.tensors)

    def decode(self, tensors: Mapping[str, Tensor]) -> QuantizedExperts:
        """Make the module from those tensors.

        Raises:
            ModelError: the experts do not have one scheme.
        """
        experts = [
            [linear.decode({name: tensors[name] for name in linear.tensors}) for linear in expert]
            for expert in self.linears
        ]
        every = [linear for expert in experts for linear in expert]
        schemes = {linear.spec.scheme for linear in every}
        if len(schemes) > 1:
            first = self.linears[0][0].tensors[0]
            raise ModelError(f"the experts beside {first} have several schemes: {', '.join(sorted(schemes))}")
        weight_spec = replace(every[0].spec.weight, symmetric=all(one.spec.weight.symmetric for one in every))
        activation = replace(every[0].spec.activation, symmetric=all(one.spec.activation.symmetric for one in every))
        spec = replace(every[0].spec, weight=weight_spec, activation=activation)
        offset = None
        if not weight_spec.symmetric:
            offset = self._stack(experts, _offset)
        weight = QuantizedTensor(
            self._stack(experts, lambda linear: linear.codes),
            self._stack(experts, lambda linear: linear.scale, weight_spec.group_rows),
            offset,
            weight_spec,
            _whole_scale(experts, self.linears[0][0].tensors[0]),
        )
        bias = self._stack(experts, _bias) if any(linear.bias is not None for linear in every) else None
        inputs = [
            torch.stack([getattr(expert[0], name) for expert in experts]) if wanted else None
            for name, wanted in (
                ("input_scale", spec.is_static),
                ("input_offset", spec.is_static),
                ("input_multiplier", every[0].input_multiplier is not None),
            )
        ]
        return QuantizedExperts(weight, spec, bias, *inputs)

    def _stack(
        self,
        experts: Sequence[Sequence[QuantizedLinear]],
        part: Callable[[QuantizedLinear], Tensor],
        size: int = 1,
    ) -> Tensor:
        """One tensor of all experts, the rows of their parts at their places; ``size`` rows of the weight make one."""
        pieces = [part(linear) for linear in experts[0]]
        shape = (len(experts), sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
        stacked = torch.empty(shape, dtype=pieces[0].dtype)
        for target, linears in zip(stacked, experts, strict=True):
            for rows, linear in zip(self.rows, linears, strict=True):
                target[rows if size == 1 else slice((rows.start or 0) // size, -(-rows.stop // size))] = part(linear)
        return stacked


def _whole_scale(experts: Sequence[Sequence[QuantizedLinear]], name: str) -> Tensor | None:
    """The scale that all linears of an expert share, [experts, 1]; None where there is none."""
    parts = [[linear.whole_scale for linear in expert] for expert in experts]
    if parts[0][0] is None:
        return None
    if any(one is None or not torch.equal(one, expert[0]) for expert in parts for one in expert):  # type: ignore[arg-type]
        raise ModelError(f"the parts of an expert beside {name} do not share the scale of the whole")
    return torch.stack([expert[0] for expert in parts if expert[0] is not None])


def _offset(linear: QuantizedLinear) -> Tensor:
    return torch.zeros_like(linear.scale, dtype=torch.int8) if linear.offset is None else linear.offset


def _bias(linear: QuantizedLinear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias
