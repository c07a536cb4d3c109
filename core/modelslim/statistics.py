# SPDX-License-Identifier: Apache-2.0
"""What a calibration pass can measure at a port (an input of a linear).

An algorithm names the classes that it needs; the engine makes one instance per port and kind,
feeds it every calibration batch once, and hands it over. Values stay on the device of the
activations: nothing here waits for the device during the pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor


class Statistic(ABC):
    """A running summary of activations ``[tokens, channels]``; order of batches never matters."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in one batch, shape [tokens, channels], any floating dtype."""

    @abstractmethod
    def merge(self, other: Statistic) -> None:
        """Take in what another instance of the same class has seen (data-parallel reduction)."""


class TokenCount(Statistic):
    """How many tokens passed the port."""

    def __init__(self) -> None:
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Count the tokens of a batch."""
        self.tokens += x.shape[0]

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, TokenCount)
        self.tokens += other.tokens


class TensorRange(Statistic):
    """Smallest and largest activation over all tokens and channels.

    Attributes:
        minimum, maximum: 0-d tensors in the dtype of the activations; exact, since the extremum of
            bf16 values is a bf16 value. A NaN among the activations makes both NaN.
    """

    def __init__(self) -> None:
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Widen the range by a batch."""
        if x.numel():
            self._take(*torch.aminmax(x))

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, TensorRange)
        if other.minimum is not None and other.maximum is not None:
            self._take(other.minimum, other.maximum)

    def _take(self, low: Tensor, high: Tensor) -> None:
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)


S = TypeVar("S", bound=Statistic)


Port = dict[type[Statistic], Statistic]
"""What is measured at one input, by kind."""


class UnitStatistics:
    """The statistics of one unit, by the name of the linear whose input was measured.

    Args:
        ports: those of linears.
        experts: those of fused experts, one for each expert.
    """

    def __init__(self, ports: Mapping[str, Port], experts: Mapping[str, Sequence[Port]] | None = None) -> None:
        self._ports = ports
        self._experts = experts or {}

    def get(self, linear: str, kind: type[S]) -> S:
        """The statistic of that kind at the input of that linear.

        Raises:
            KeyError: it was not declared by ``Algorithm.needs``.
        """
        statistic = self._ports[linear][kind]
        assert isinstance(statistic, kind)
        return statistic

    def get_experts(self, linear: str, kind: type[S]) -> list[S]:
        """The statistics of that kind at the input of an ``ExpertLinear``, one for each expert.

        Raises:
            KeyError: it was not declared by ``Algorithm.needs``.
        """
        statistics = [port[kind] for port in self._experts[linear]]
        return [statistic for statistic in statistics if isinstance(statistic, kind)]
