# SPDX-License-Identifier: Apache-2.0
"""Measures the inputs of linears in one pass; linears that read the same tensor share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelslim.statistics import Statistic, UnitStatistics

Kinds = frozenset[type[Statistic]]


Port = dict[type[Statistic], Statistic]


class PortCollector:
    """Collects the statistics of one unit while its forward runs.

    The first linear that reads a tensor leads the port; one that reads the very same tensor in the
    same forward (q, k and v; gate and up) joins it. So each statistic is computed once per port, and
    linears of one port get the very same static scale.

    Args:
        linears: modules by name.
        needs: what is wanted of their inputs, by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module], needs: Mapping[str, Kinds]) -> None:
        self._linears = linears
        self._needs = needs
        self._ports: dict[str, Port] = {}
        # By identity and version of the tensor, which is kept so that no other can take its identity.
        self._seen: dict[tuple[int, int], tuple[Tensor, list[Port]]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PortCollector:
        self._handles = [
            self._linears[name].register_forward_pre_hook(self._hook(name), with_kwargs=True) for name in self._needs
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

    def statistics(self) -> UnitStatistics:
        """What was measured. A linear that no token reached has statistics that saw nothing."""
        for name, kinds in self._needs.items():
            self._ports.setdefault(name, {kind: kind() for kind in kinds})
        return UnitStatistics(self._ports)

    def _hook(self, name: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    def _assign(self, name: str, known: Sequence[Port]) -> Port:
        """The port of a linear, at the first tensor that reaches it: one that has seen the tensor, or a new one."""
        kinds = self._needs[name]
        leader = next((port for port in known if kinds <= port.keys()), None)
        return {kind: kind() for kind in kinds} if leader is None else leader


def _version(x: Tensor) -> int:
    """Counts what was done to the tensor in place; behind that it is another input."""
    return 0 if x.is_inference() else x._version
