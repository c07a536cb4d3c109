# SPDX-License-Identifier: Apache-2.0
"""Measures the inputs of linears in one pass; linears that read the same tensor share the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelslim.experts import ExpertLinear
from modelslim.statistics import Port, RowSample, Statistic, UnitStatistics

Kinds = frozenset[type[Statistic]]


class PortCollector:
    """Collects the statistics of one unit while its forward runs.

    The first linear that reads a tensor leads the port; one that reads the very same tensor in the
    same forward (q, k and v; gate and up) joins it. So each statistic is computed once per port, and
    linears of one port get the very same static scale. Every expert of a fused weight has a port of
    its own, which sees the tokens that came to it.

    Attributes:
        tokens: how many tokens each expert of a fused weight showed, by the name of the weight's module.

    Args:
        linears: modules by name.
        needs: what is wanted of their inputs, by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module], needs: Mapping[str, Kinds]) -> None:
        self._linears = linears
        self._needs = needs
        self._ports: dict[str, Port] = {}
        self._experts: dict[str, list[Port]] = {}
        self.tokens: dict[str, list[int]] = {}
        for name, kinds in needs.items():
            module = linears[name]
            if isinstance(module, ExpertLinear):
                self._experts[name] = [_expert_port(kinds, module.experts) for _ in range(module.experts)]
                self.tokens[name] = [0] * module.experts
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
        self._seen.clear()

    def next_sample(self) -> None:
        """Forget which tensors the last forward showed."""
        self._seen.clear()

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
            if name not in self._ports:
                self._ports[name] = self._assign(name, known)
            port = self._ports[name]
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
            self.tokens[name] = [known + count for known, count in zip(self.tokens[name], counts, strict=True)]
            for port, rows in zip(self._experts[name], x[: sum(counts)].split(counts), strict=True):
                if len(rows):
                    for statistic in port.values():
                        statistic.update(rows)

        return observe

    def _assign(self, name: str, known: Sequence[Port]) -> Port:
        """The port of a linear, at the first tensor that reaches it: one that has seen the tensor, or a new one."""
        kinds = self._needs[name]
        leader = next((port for port in known if kinds <= port.keys()), None)
        return {kind: kind() for kind in kinds} if leader is None else leader


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
