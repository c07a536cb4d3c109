# SPDX-License-Identifier: Apache-2.0
"""All that was measured in one unit, by linear; it follows what algorithms do to the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from modelslim.statistics import ChannelRange, Statistic, TensorRange

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

    def by_input(self, linears: Iterable[str]) -> list[list[str]]:
        """Linears that read the same tensor together, in the order of the first of each; one not measured is alone."""
        found: dict[int | str, list[str]] = {}
        for name in linears:
            port = self._ports.get(name)
            found.setdefault(name if port is None else id(port), []).append(name)
        return list(found.values())

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
