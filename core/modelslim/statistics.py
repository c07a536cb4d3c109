# SPDX-License-Identifier: Apache-2.0
"""What a calibration pass can measure at a port (an input of a linear).

An algorithm names the classes that it needs; the engine makes one instance per port and kind,
feeds it every calibration batch once, and hands it over. Values stay on the device of the
activations: nothing here waits for the device during the pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

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
            result.minimum, result.maximum = (_rescale(x, scale, shift) for x in (self.minimum, self.maximum))
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

    Only what lies on and above the diagonal is summed; the rest is its mirror image.

    Attributes:
        total: float32 [channels], the sum of the tokens.
        tokens: how many tokens were seen.
    """

    heavy = True

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._is_mirrored = False
        self.total: Tensor | None = None
        self.tokens = 0

    @property
    def matrix(self) -> Tensor | None:
        """float32 [channels, channels], symmetric, the sum over tokens; None before the first one."""
        if self._sums is not None and not self._is_mirrored:
            for columns in range(0, len(self._sums), _COLUMNS):
                beyond = columns + _COLUMNS
                self._sums[beyond:, columns:beyond] = self._sums[columns:beyond, beyond:].t()
            self._is_mirrored = True
        return self._sums

    def update(self, x: Tensor) -> None:
        """Add a batch."""
        if not x.numel():
            return
        with bfloat16_products(x):
            x = x.to(torch.float32)
            if self._sums is None or self.total is None:
                self._sums, self.total = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
            for columns in range(0, x.shape[1], _COLUMNS):
                some = x[:, columns : columns + _COLUMNS]
                self._sums[columns : columns + _COLUMNS, columns:].addmm_(some.t(), x[:, columns:])
            self.total += x.sum(0)
        self._is_mirrored = False
        self.tokens += len(x)

    def merge(self, other: Statistic) -> None:
        """Add what another instance saw."""
        assert isinstance(other, Gram)
        if other._sums is None or other.total is None:
            return
        if self._sums is None or self.total is None:
            self._sums, self.total = other._sums.clone(), other.total.clone()
        else:
            self._sums += other._sums
            self.total += other.total
        self._is_mirrored = False
        self.tokens += other.tokens

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> Gram:
        """The matrix after the rescaling; exact."""
        result = Gram()
        result.tokens = self.tokens
        matrix, total = self.matrix, self.total
        if matrix is not None and total is not None:
            if shift is not None:
                outer = torch.outer(total, shift)
                matrix = matrix - outer - outer.t() + self.tokens * torch.outer(shift, shift)
                total = total - self.tokens * shift
            result._sums = matrix / torch.outer(scale, scale)
            result.total = total / scale
        return result


class RowSample(Statistic):
    """Some tokens as they are, spread evenly over all that came by.

    Every token has a key that depends on its place alone, and those with the lowest keys are kept, of equal ones the
    first (bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", 2007). So it does not
    matter how batches and samples are grouped: what is kept of all is kept of each part.

    Attributes:
        capacity: how many tokens are kept at most.
    """

    capacity = 256

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._bound = _KEYS
        self._seen = 0

    def update(self, x: Tensor) -> None:
        """Keep some tokens of a batch."""
        places = torch.arange(self._seen, self._seen + len(x))
        self._seen += len(x)
        keys = (places * _STEP + _START) % _KEYS
        chosen = self._choose(keys)
        self._add(x[chosen.to(x.device)], keys[chosen])

    def merge(self, other: Statistic) -> None:
        """Add what another instance keeps."""
        assert isinstance(other, RowSample)
        for part, keys in zip(other._parts, other._keys, strict=True):
            keys = keys.to("cpu")  # from another rank they come to this one's device
            chosen = self._choose(keys)
            self._add(part if len(chosen) == len(part) else part[chosen.to(part.device)], keys[chosen])

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> RowSample:
        """The same tokens after the rescaling, in float32."""
        result = type(self)()
        vars(result).update(vars(self), _keys=list(self._keys))
        result._parts = [_rescale(part, scale, shift) for part in self._parts]
        return result

    @classmethod
    def condense(cls, samples: Sequence[Statistic]) -> None:
        """Drop what is not among the lowest keys of all."""
        held = [one for one in samples if isinstance(one, RowSample)]
        keys = [key for one in held for key in one._keys]
        if sum(map(len, keys)) > held[0].capacity:
            bound = int(torch.cat(keys).kthvalue(held[0].capacity).values)
            for one in held:
                one._keep([key <= bound for key in one._keys])

    @property
    def rows(self) -> Tensor | None:
        """[kept tokens, channels], in the order in which they came; None before the first token."""
        self._thin()
        return torch.cat(self._parts) if self._parts else None

    def _choose(self, keys: Tensor) -> Tensor:
        """Places of those that may be kept, in their order."""
        chosen = (keys < self._bound).nonzero().view(-1)
        return chosen if len(chosen) <= self.capacity else chosen[_lowest(keys[chosen], self.capacity)]

    def _add(self, rows: Tensor, keys: Tensor) -> None:
        if len(keys):
            self._parts.append(rows)
            self._keys.append(keys)
        if sum(map(len, self._keys)) > 2 * self.capacity:  # not each time, since all rows are copied
            self._thin()

    def _thin(self) -> None:
        """Keep no more than the capacity."""
        keys = torch.cat(self._keys) if self._keys else torch.empty(0)
        if len(keys) > self.capacity:
            is_kept = torch.zeros(len(keys), dtype=torch.bool)
            is_kept[_lowest(keys, self.capacity)] = True
            self._bound = int(keys[is_kept].max())
            self._keep(torch.split(is_kept, list(map(len, self._keys))))

    def _keep(self, masks: Sequence[Tensor]) -> None:
        """Keep these rows of each part."""
        parts, keys = [], []
        for part, key, mask in zip(self._parts, self._keys, masks, strict=True):
            chosen = mask.nonzero().view(-1)
            if len(chosen):
                parts.append(part if len(chosen) == len(part) else part[chosen.to(part.device)])
                keys.append(key[chosen])
        self._parts, self._keys = parts, keys


_KEYS = 1 << 32
_STEP, _START = 2654435769, 1 << 31
"""Multiples of the golden ratio, whose lowest lie evenly apart, and not at the first token, which is like no other."""


def _lowest(keys: Tensor, count: int) -> Tensor:
    """Places of the lowest keys, of equal ones the first, in their order."""
    return keys.sort(stable=True).indices[:count].sort().values


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows in float32 at least; on a CPU as many at once as stay in its cache."""
    rows = max(1, _BLOCK // x.shape[1]) if x.is_cpu else len(x)
    return (part if part.dtype.itemsize >= 4 else part.to(torch.float32) for part in torch.split(x, rows))


def _rescale(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    x = x.to(torch.float32)
    return (x if shift is None else x - shift) / scale


S = TypeVar("S", bound=Statistic)


Port = dict[type[Statistic], Statistic]
"""What is measured at one input, by kind."""


class UnitStatistics:
    """The statistics of one unit, by the name of the linear whose input was measured.

    Args:
        ports: those of linears.
        experts: those of fused experts, one for each expert.

    Attributes:
        divisors: float32 [channels], or [experts, channels], by which inputs were divided, by the name of the linear.
    """

    def __init__(self, ports: Mapping[str, Port], experts: Mapping[str, Sequence[Port]] | None = None) -> None:
        self._ports = dict(ports)
        self._experts = dict(experts or {})
        self.divisors: dict[str, Tensor] = {}

    def get(self, linear: str, kind: type[S]) -> S:
        """The statistic of that kind at the input of that linear.

        Raises:
            KeyError: it was not declared by ``Algorithm.needs``.
        """
        return _of(self._ports[linear], kind)

    def get_experts(self, linear: str, kind: type[S]) -> list[S]:
        """The statistics of that kind at the input of an ``ExpertLinear``, one for each expert.

        Raises:
            KeyError: it was not declared by ``Algorithm.needs``.
        """
        return [_of(port, kind) for port in self._experts[linear]]

    def measured(self, kind: type[S]) -> Iterator[tuple[str, list[S]]]:
        """Every linear at whose input that kind was measured, with the statistic; of fused experts, one for each."""
        for name, ports in {**{name: [port] for name, port in self._ports.items()}, **self._experts}.items():
            found = [port[kind] for port in ports if kind in port]
            if found:
                yield name, found  # type: ignore[misc]

    def merge(self, other: UnitStatistics) -> None:
        """Take in what another instance measured of the same needs on other samples (data-parallel reduction)."""
        for port, taken in _pairs(self._ports, other._ports):
            for kind, statistic in port.items():
                statistic.merge(taken[kind])
        for name, ports in self._experts.items():
            for port, taken in zip(ports, other._experts[name], strict=True):
                for kind, statistic in port.items():
                    statistic.merge(taken[kind])

    def shares_port(self, linear: str, other: str) -> bool:
        """True when both linears read the same tensor."""
        return linear in self._ports and self._ports.get(other) is self._ports[linear]

    def rescale(self, linears: Iterable[str], scale: Tensor, shift: Tensor | None = None) -> None:
        """Say that the inputs of these linears are ``(x - shift) / scale`` from now on.

        Args:
            linears: names of linears, fused experts or other measured modules; unmeasured ones are passed over.
            scale: [channels], positive; of fused experts also [experts, channels].
            shift: [channels], or None for no shift.
        """
        # Linears that shared a port share the new one.
        done: dict[int, Port] = {}

        def follow(port: Port, scale: Tensor) -> Port:
            if id(port) not in done:
                # What cannot follow has been used; whoever wants it anew gets a pass of its own.
                done[id(port)] = {
                    kind: statistic.rescaled(scale, shift)
                    for kind, statistic in port.items()
                    if kind.rescaled is not Statistic.rescaled and (shift is None or kind.follows_shift)
                }
            return done[id(port)]

        before = dict(self._ports), dict(self._experts)  # keeps the identities alive
        for linear in linears:
            if linear in before[0]:
                self._ports[linear] = follow(before[0][linear], scale)
            elif linear in before[1]:
                ports = before[1][linear]
                scales = scale.expand(len(ports), -1)
                self._experts[linear] = [follow(port, one) for port, one in zip(ports, scales, strict=True)]
            else:
                continue
            self.divisors[linear] = scale * self.divisors[linear] if linear in self.divisors else scale


def follows_rescaling(kind: type[Statistic], *, shifts: bool = False) -> bool:
    """True when a statistic of this kind is known behind a rescaling, with a shift or not, without a new pass."""
    return kind is TensorRange or (kind.rescaled is not Statistic.rescaled and (kind.follows_shift or not shifts))


def _pairs(ports: Mapping[str, Port], others: Mapping[str, Port]) -> Iterator[tuple[Port, Port]]:
    """Each port once, with its counterpart."""
    done: set[int] = set()
    for name, port in ports.items():
        if id(port) not in done:
            done.add(id(port))
            yield port, others[name]


def _of(port: Port, kind: type[S]) -> S:
    """The statistic of that kind; the range of the whole is told from those of the channels."""
    if kind is TensorRange and ChannelRange in port:
        ranges = port[ChannelRange]
        assert isinstance(ranges, ChannelRange)
        whole = ranges.whole()
        assert isinstance(whole, kind)
        return whole
    statistic = port[kind]
    assert isinstance(statistic, kind)
    return statistic
