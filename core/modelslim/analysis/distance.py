# SPDX-License-Identifier: Apache-2.0
"""How far some outputs are from the float ones, summed up sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Distance:
    """Sums over what was compared.

    Attributes:
        noise: squared differences.
        power: squared values of the float output.
        values: how many.
    """

    noise: float = 0.0
    power: float = 0.0
    values: int = 0

    def add(self, y: Tensor, expected: Tensor) -> None:
        """Compare an output with the float one, [..., channels] both."""
        wanted = expected.to(torch.float32)
        self.noise += float((y.to(torch.float32) - wanted).square().sum(dtype=torch.float64))
        self.power += float(wanted.square().sum(dtype=torch.float64))
        self.values += expected.numel()

    @property
    def mse(self) -> float | None:
        """Mean squared error; None when nothing was compared."""
        return self.noise / self.values if self.values else None

    @property
    def relative(self) -> float | None:
        """Share of the output's power that the error has; None when nothing was compared."""
        return self.noise / self.power if self.power else None
