# SPDX-License-Identifier: Apache-2.0
"""What a calibration pass can measure at a port (an input of a linear).

An algorithm names the classes that it needs; the engine makes one instance per port and kind,
feeds it every calibration batch once, and hands it over. Values stay on the device of the
activations: nothing here waits for the device during the pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modelslim.devices import bfloat16_products

_BLOCK = 1 << 17  # values
_COLUMNS = 512  # of a product at once


class Statistic(ABC):
    """A running summary of activations ``[tokens, channels]``; order of batches never matters.

    Attributes:
        follows_shift: False for a class whose ``rescaled`` takes a scale and no shift.
        heavy: True for a class that grows with the square of the channels.
    """

    follows_shift: ClassVar[bool] = True
    heavy: ClassVar[bool] = False

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in one batch, shape [tokens, channels], any floating dtype."""

    @abstractmethod
    def merge(self, other: Statistic) -> None:
        """Take in what another instance of the same class has seen (data-parallel reduction)."""

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> Statistic:
        """What ``(x - shift) / scale`` would have given; for classes that can tell without a new pass.

        Args:
            scale: [channels], positive.
            shift: [channels], or None for no shift.
        """
        raise TypeError(f"{type(self).__name__} does not follow a rescaling")

    @classmethod  # noqa: B027  (most keep all that they have)
    def condense(cls, statistics: Sequence[Statistic]) -> None:
        """Drop what the merged one of these, and of others, will not keep; before they are sent to other ranks.

        Args:
            statistics: of this class, of which each has seen other tokens of one input.
        """


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

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> TokenCount:
        """As many as before."""
        return self


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


class ChannelRange(Statistic):
    """Smallest and largest activation of every channel.

    Attributes:
        minimum, maximum: [channels] in the dtype of the activations, exact; None before the first
            token. A NaN among the activations makes both NaN.
    """

    def __init__(self) -> None:
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Widen the ranges by a batch."""
        if x.numel():
            # Not torch.aminmax, which along rows takes ten times as long on a CPU.
            ends = [(part.amin(0), part.amax(0)) for part in _blocks(x)]
            low, high = (torch.stack(values) for values in zip(*ends, strict=True))
            self._take(low.amin(0).to(x.dtype), high.amax(0).to(x.dtype))

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, ChannelRange)
        if other.minimum is not None and other.maximum is not None:
            self._take(other.minimum, other.maximum)

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> ChannelRange:
        """The ranges after the rescaling, in float32."""
        result = ChannelRange()
        if self.minimum is not None and self.maximum is not None:
            result.minimum, result.maximum = (rescale_tokens(x, scale, shift) for x in (self.minimum, self.maximum))
        return result

    def whole(self) -> TensorRange:
        """The range over all channels."""
        result = TensorRange()
        if self.minimum is not None and self.maximum is not None:
            result.minimum, result.maximum = self.minimum.amin(), self.maximum.amax()
        return result

    def _take(self, low: Tensor, high: Tensor) -> None:
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)


class ChannelAbsMean(Statistic):
    """Mean magnitude of every channel.

    Attributes:
        total: float64 [channels], the sum of magnitudes; None before the first token.
        tokens: how many tokens were seen.
    """

    follows_shift = False

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add a batch."""
        if x.numel():
            for part in _blocks(x):
                self._take(part.abs().sum(0).to(torch.float64), len(part))

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, ChannelAbsMean)
        if other.total is not None:
            self._take(other.total, other.tokens)

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> ChannelAbsMean:
        """The means after a rescaling without a shift."""
        if shift is not None:
            raise TypeError("ChannelAbsMean does not follow a shift")
        result = ChannelAbsMean()
        result.tokens = self.tokens
        result.total = None if self.total is None else self.total / scale
        return result

    @property
    def mean(self) -> Tensor:
        """float32 [channels]; some token must have been seen."""
        assert self.total is not None
        return (self.total / self.tokens).to(torch.float32)

    def _take(self, total: Tensor, tokens: int) -> None:
        self.total = total if self.total is None else self.total + total
        self.tokens += tokens


class ChannelEnergy(Statistic):
    """Sum of squares of every channel: the diagonal of the Gram matrix, at the price of reading the tokens once.

    Attributes:
        squares: float64 [channels], the sum over tokens; None before the first one.
        total: float64 [channels], the sum of the tokens.
        tokens: how many tokens were seen.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add a batch."""
        if x.numel():
            for part in _blocks(x):
                self._take(part.square().sum(0).to(torch.float64), part.sum(0).to(torch.float64), len(part))

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, ChannelEnergy)
        if other.squares is not None and other.total is not None:
            self._take(other.squares, other.total, other.tokens)

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> ChannelEnergy:
        """The sums after the rescaling."""
        result = ChannelEnergy()
        result.tokens = self.tokens
        if self.squares is not None and self.total is not None:
            squares, total = self.squares, self.total
            if shift is not None:
                squares = (squares - 2 * shift * total + self.tokens * shift.double().square()).clamp(min=0)
                total = total - self.tokens * shift
            result.squares, result.total = squares / scale.double().square(), total / scale
        return result

    def _take(self, squares: Tensor, total: Tensor, tokens: int) -> None:
        self.squares = squares if self.squares is None else self.squares + squares
        self.total = total if self.total is None else self.total + total
        self.tokens += tokens


class Gram(Statistic):
    """``X^T X`` of all tokens, which second-order rounding wants.

    Only what lies on and above the diagonal is summed, sent and held; the rest is its mirror image.

    Attributes:
        total: float32 [channels], the sum of the tokens.
        tokens: how many tokens were seen.
    """

    heavy = True

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # a block of rows each, from the diagonal on
        self._whole: Tensor | None = None  # instead of them, once it was asked for
        self.total: Tensor | None = None
        self.tokens = 0

    @property
    def matrix(self) -> Tensor | None:
        """float32 [channels, channels], symmetric, the sum over tokens; None before the first one."""
        if self._rows:
            channels = self._rows[0].shape[1]
            self._whole = self._rows[0].new_empty(channels, channels)
            for rows, (start, stop) in zip(self._rows, _ranges(channels), strict=True):
                self._whole[start:stop, start:] = rows
                self._whole[stop:, start:stop] = rows[:, stop - start :].t()
            self._rows = []
        return self._whole

    def update(self, x: Tensor) -> None:
        """Add a batch."""
        if not x.numel():
            return
        with bfloat16_products(x):
            x = x.to(torch.float32)
            rows = self._halved()
            for index, (start, stop) in enumerate(_ranges(x.shape[1])):
                if index < len(rows):
                    rows[index].addmm_(x[:, start:stop].t(), x[:, start:])
                else:
                    rows.append(x[:, start:stop].t() @ x[:, start:])
            self.total = x.sum(0) if self.total is None else self.total.add_(x.sum(0))
        self.tokens += len(x)

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, Gram)
        if other.total is None:
            return
        rows, others = self._halved(), other._halved()
        if self.total is None:
            self._rows, self.total = [one.clone() for one in others], other.total.clone()
        else:
            for one, more in zip(rows, others, strict=True):
                one += more
            self.total += other.total
        self.tokens += other.tokens

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> Gram:
        """The matrix after the rescaling; exact."""
        result = Gram()
        result.tokens = self.tokens
        total = self.total
        if total is None:
            return result
        for rows, (start, stop) in zip(self._halved(), _ranges(len(total)), strict=True):
            part = rows
            if shift is not None:
                part = part - torch.outer(total[start:stop], shift[start:])
                part -= torch.outer(shift[start:stop], total[start:])
                part += self.tokens * torch.outer(shift[start:stop], shift[start:])
            result._rows.append(part / torch.outer(scale[start:stop], scale[start:]))
        result.total = (total if shift is None else total - self.tokens * shift) / scale
        return result

    def _halved(self) -> list[Tensor]:
        """Blocks of rows from the diagonal on."""
        if self._whole is not None:
            self._rows = [self._whole[start:stop, start:].clone() for start, stop in _ranges(len(self._whole))]
            self._whole = None
        return self._rows


def _ranges(channels: int) -> list[tuple[int, int]]:
    """Where blocks of channels begin and end."""
    return [(start, min(start + _COLUMNS, channels)) for start in range(0, channels, _COLUMNS)]


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows in float32 at least; on a CPU as many at once as stay in its cache."""
    rows = max(1, _BLOCK // x.shape[1]) if x.is_cpu else len(x)
    return (part if part.dtype.itemsize >= 4 else part.to(torch.float32) for part in torch.split(x, rows))


def rescale_tokens(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Tokens, or their ranges, behind a rescaling: ``(x - shift) / scale`` in float32."""
    x = x.to(torch.float32)
    return (x if shift is None else x - shift) / scale
