# SPDX-License-Identifier: Apache-2.0
"""Measures the inputs of linears in one pass; linears that read the same tensor share the work."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelslim.experts import ExpertLinear
from modelslim.ranks import Ranks
from modelslim.row_sample import RowSample
from modelslim.statistics import Statistic
from modelslim.unit_statistics import Port, UnitStatistics
from modelslim.wire import statistic_from, statistic_state, take_apart

Kinds = frozenset[type[Statistic]]

_ROUNDS_HELD = 8  # their samples of rows weigh some megabytes each
_BYTES_HELD = 32 << 20  # of rounds with second moments, where one does not weigh more


@dataclass
class _Part:
    """What a group of samples showed.

    Attributes:
        ports: by linear; linears of one port have the same object.
        experts: by fused weight, of the experts to which tokens came.
        tokens: how many came to each expert.
    """

    ports: dict[str, Port] = field(default_factory=dict)
    experts: dict[str, dict[int, Port]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, part: _Part) -> None:
        """Add what others showed, whose statistics are not used any more."""
        _add_ports(self.ports, part.ports)
        for name, ports in part.experts.items():
            known = self.experts.setdefault(name, {})
            for expert, port in ports.items():
                if expert in known:
                    _merge_port(known[expert], port)
                else:
                    known[expert] = port
        for name, counts in part.tokens.items():
            self.tokens[name] = _summed(self.tokens[name], counts) if name in self.tokens else counts


class PortCollector:
    """Collects the statistics of one unit while its forward runs.

    The first linear that reads a tensor leads the port; one that reads the very same tensor in the
    same forward (q, k and v; gate and up) joins it. So each statistic is computed once per port, and
    linears of one port get the very same static scale. Every expert of a fused weight has a port of
    its own, which sees the tokens that came to it.

    What a group of samples showed is added to its block when the group ends, and a block to the whole, in their
    order, whichever rank has computed it: sums are the same to the bit for any number of ranks.

    Attributes:
        tokens: how many tokens each expert of a fused weight showed, by the name of the weight's module.

    Args:
        linears: modules by name.
        needs: what is wanted of their inputs, by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module], needs: Mapping[str, Kinds]) -> None:
        self._linears = linears
        self._needs = needs
        kinds = {kind for wanted in needs.values() for kind in wanted}
        self._kinds = sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))
        self._ports: dict[str, Port] = {}
        self._experts: dict[str, list[Port]] = {}
        self.tokens: dict[str, list[int]] = {}
        for name, wanted in needs.items():
            module = linears[name]
            if isinstance(module, ExpertLinear):
                self._experts[name] = [_expert_port(wanted, module.experts) for _ in range(module.experts)]
                self.tokens[name] = [0] * module.experts
        self._part = _Part()
        self._block = _Part()
        self._held: list[_Part] = []
        self._told = _Part()  # the block that ranks tell each other of
        self._parts_told = 0
        self._is_heavy = any(kind.heavy for kind in self._kinds)
        self._rounds_at_once = 1 if self._is_heavy else _ROUNDS_HELD
        # By identity and version of the tensor, which is kept so that no other can take its identity.
        self._seen: dict[tuple[int, int], tuple[Tensor, list[Port]]] = {}
        self._handles: list[RemovableHandle] = []
        self._paused = False

    def __enter__(self) -> PortCollector:
        self._handles = [
            self._linears[name].register_forward_pre_hook(
                self._expert_hook(name) if name in self._experts else self._hook(name), with_kwargs=True
            )
            for name in self._needs
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._end()

    def next_sample(self) -> None:
        """Forget which tensors the last forward showed."""
        self._seen.clear()

    def end_group(self) -> None:
        """Add what a group of samples showed to its block."""
        self._seen.clear()
        part, self._part = self._part, _Part()
        self._block.add(part)

    def end_block(self) -> None:
        """Add a block to the whole."""
        block, self._block = self._block, _Part()
        self._add(block)

    def hold(self) -> None:
        """Keep what the groups of a round showed until ranks exchange it."""
        self._held.append(self._block)
        self._block = _Part()

    def exchange(self, ranks: Ranks, ends: frozenset[int], is_last: bool) -> None:
        """Add what all ranks hold, as much at each: the first round of each rank, then the second of each.

        Args:
            ranks: who shares the samples.
            ends: with so many of these a block is complete.
            is_last: True when no more rounds follow; the next exchange counts anew.
        """
        if self._needs:
            self._condense()
            everywhere = ranks.gather([self._state(part) for part in self._held])
            self._weigh(everywhere)
            for states in zip(*everywhere, strict=True):
                for state in states:
                    self._told.add(self._part_from(state))
                    self._parts_told += 1
                    if self._parts_told in ends:
                        block, self._told = self._told, _Part()
                        self._add(block)
        self._held.clear()
        if is_last:
            self._parts_told = 0

    def _add(self, block: _Part) -> None:
        _add_ports(self._ports, block.ports)
        for name, ports in block.experts.items():
            for expert, port in ports.items():
                _merge_port(self._experts[name][expert], port)
        for name, counts in block.tokens.items():
            self.tokens[name] = _summed(self.tokens[name], counts)

    def _end(self) -> None:
        """Nothing more is measured."""
        self.end_group()
        self.end_block()

    def _condense(self) -> None:
        """Leave of the groups that are held what is kept of them together."""
        same: dict[Hashable, list[Statistic]] = {}
        for part in self._held:
            for names, port in _by_port(part.ports):
                for kind, statistic in port.items():
                    same.setdefault((kind, *names), []).append(statistic)
            for name, ports in part.experts.items():
                for expert, port in ports.items():
                    for kind, statistic in port.items():
                        same.setdefault((kind, name, expert), []).append(statistic)
        for found in same.values():
            type(found[0]).condense(found)

    @property
    def rounds_at_once(self) -> int:
        """How many rounds are held before they are exchanged, which makes ranks wait for each other.

        The same at all ranks, which tell from what they exchanged last.
        """
        return self._rounds_at_once

    def _weigh(self, everywhere: Sequence[Sequence[Any]]) -> None:
        """Hold as many heavy rounds from now on as weigh little."""
        if self._is_heavy:
            tensors: list[dict[int, Tensor]] = []
            for state in chain.from_iterable(everywhere):
                tensors.append({})
                take_apart(state, tensors[-1])
            most = max(sum(one.nbytes for one in found.values()) for found in tensors)
            self._rounds_at_once = min(max(_BYTES_HELD // max(most, 1), 1), _ROUNDS_HELD)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing while this is open."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def wanted(self) -> frozenset[str]:
        """Names of what is measured."""
        return frozenset(self._needs)

    @property
    def ports(self) -> Mapping[str, Port]:
        """What was measured at linears; one that no token reached is missing."""
        return self._ports

    @property
    def experts(self) -> Mapping[str, Sequence[Port]]:
        """What was measured at fused experts."""
        return self._experts

    def set_port(self, name: str, port: Port) -> None:
        """Supply what could not be measured at a linear."""
        self._ports[name] = port

    def statistics(self) -> UnitStatistics:
        """What was measured. A linear that no token reached has statistics that saw nothing."""
        self._end()
        for name, kinds in self._needs.items():
            if name not in self._experts:
                self._ports.setdefault(name, {kind: kind() for kind in kinds})
        return UnitStatistics(self._ports, self._experts)

    def _hook(self, name: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._paused:
                return
            x: Tensor = args[0] if args else kwargs["input"]
            _, known = self._seen.setdefault((id(x), _version(x)), (x, []))
            ports = self._part.ports
            if name not in ports:
                ports[name] = self._assign(name, known)
            port = ports[name]
            if not any(other is port for other in known):
                for statistic in port.values():
                    statistic.update(x.reshape(-1, x.shape[-1]))
                known.append(port)

        return observe

    def _expert_hook(self, name: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._paused:
                return
            x, counts = args
            tokens = self._part.tokens.setdefault(name, [0] * len(counts))
            self._part.tokens[name] = _summed(tokens, counts)
            ports = self._part.experts.setdefault(name, {})
            for expert, rows in enumerate(x[: sum(counts)].split(counts)):
                if len(rows):
                    if expert not in ports:
                        ports[expert] = _expert_port(self._needs[name], len(counts))
                    for statistic in ports[expert].values():
                        statistic.update(rows)

        return observe

    def _assign(self, name: str, known: Sequence[Port]) -> Port:
        """The port of a linear, at the first tensor that reaches it: one that has seen the tensor, or a new one."""
        kinds = self._needs[name]
        leader = next((port for port in known if kinds <= port.keys()), None)
        return {kind: kind() for kind in kinds} if leader is None else leader

    def _state(self, part: _Part) -> Any:
        """A part as a value that can be taken apart."""
        ports = [[names, self._port_state(port)] for names, port in _by_port(part.ports)]
        experts = {
            name: {expert: self._port_state(port) for expert, port in ports.items()}
            for name, ports in part.experts.items()
        }
        return [ports, experts, part.tokens]

    def _port_state(self, port: Port) -> dict[int, Any]:
        return {self._kinds.index(kind): statistic_state(statistic) for kind, statistic in port.items()}

    def _part_from(self, state: Any) -> _Part:
        """The reverse of ``_state``."""

        def port(state: Mapping[int, Any]) -> Port:
            return {self._kinds[kind]: statistic_from(self._kinds[kind], one) for kind, one in state.items()}

        ports, experts, tokens = state
        part = _Part(tokens=tokens)
        for names, one in ports:
            part.ports.update(dict.fromkeys(names, port(one)))
        part.experts = {name: {expert: port(one) for expert, one in some.items()} for name, some in experts.items()}
        return part


def _by_port(ports: Mapping[str, Port]) -> list[tuple[list[str], Port]]:
    """Each port once, with the names of its linears."""
    found: dict[int, tuple[list[str], Port]] = {}
    for name, port in ports.items():
        found.setdefault(id(port), ([], port))[0].append(name)
    return list(found.values())


def _add_ports(ports: dict[str, Port], others: Mapping[str, Port]) -> None:
    """Add ports of linears; those that are new are taken as they are."""
    for names, port in _by_port(others):
        known = list({id(one): one for name in names if (one := ports.get(name)) is not None}.values())
        for one in known:
            _merge_port(one, port)
        for name in names:
            ports.setdefault(name, known[0] if known else port)


def _summed(counts: Sequence[int], others: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(counts, others, strict=True)]


def _merge_port(port: Port, other: Port) -> None:
    for kind, statistic in port.items():
        if kind in other:
            statistic.merge(other[kind])


def _expert_port(kinds: Kinds, experts: int) -> Port:
    """What is measured at one of so many experts; their samples together stay as small as those of a few linears."""
    port: Port = {kind: kind() for kind in kinds}
    sample = port.get(RowSample)
    if isinstance(sample, RowSample):
        sample.capacity = max(16, 8 * RowSample.capacity // experts)
    return port


def _version(x: Tensor) -> int:
    """Counts what was done to the tensor in place; behind that it is another input."""
    return 0 if x.is_inference() else x._version
