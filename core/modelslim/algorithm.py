# SPDX-License-Identifier: Apache-2.0
"""The base classes of what an entry of ``process`` in the protocol names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from modelslim.ranks import ALONE, Ranks
from modelslim.types import CacheInfo, LinearInfo, Problem, ProcessRequest, QuantSpec, Subgraph, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from modelslim.context import Namespace
    from modelslim.kv_cache import QuantizedCache
    from modelslim.statistics import Statistic
    from modelslim.unit_statistics import UnitStatistics

Pattern = tuple[tuple[str | int, ...], str]
"""A pattern with its place relative to the algorithm's configuration: ``(("include", 0), "*mlp*")``."""


Entry = tuple[tuple[str | int, ...], Mapping[str, Any]]
"""A configuration with its place relative to the entry that holds it: ``(("configs", 0), {...})``."""


@dataclass(frozen=True)
class Unit:
    """What an algorithm sees of a unit.

    Attributes:
        name: dotted path of the unit in the model; empty for the linears outside all units.
        linears: the unit's linears by their full names, with their weights loaded; those of fused
            experts as one ``ExpertLinear`` under its own name. Those that an earlier stage quantizes are missing.
        specs: what the plan gave to *this* algorithm, by the same names; a subset of ``linears``.
        modules: every module of the unit by its full name, norms and routers included.
        subgraphs: what smoothing may rescale in this unit, as the adapter says; empty unless an
            algorithm of the run requires the hook.
        module: the unit itself; None for what lies outside all units.
        calls: the calls of the unit on the calibration samples, with their arguments, for an
            algorithm that ``replays``: ``unit.module.forward(*call.args, **call.kwargs)`` computes one.
            Empty for others, and while planning. Arguments must not be changed.
        caches: what the plan gave to *this* algorithm of the unit's key/value caches, by the names of the modules
            through which keys and values enter them, which are measured like linears.
        targets: what the unit returns for each of these calls in the float model, whose earlier units
            are float too; so they differ from the output on ``calls`` when those carry the errors of
            earlier units. Must not be changed. Behind prior stages the float model is what they made of it.
        ranks: the processes that share the run. All of them call ``apply`` with the same values, so that an
            algorithm may divide its work among them and gather what they found; none of them may leave out a
            ``gather``. Most algorithms have no use for it.
        context: the namespaces that the algorithm's ``hands_over`` and ``takes_over`` name; filled for ``apply``.
            All ranks must write the same.
    """

    name: str
    linears: Mapping[str, nn.Module]
    specs: Mapping[str, QuantSpec]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    subgraphs: Sequence[Subgraph] = ()
    module: nn.Module | None = None
    calls: Sequence[ProcessRequest] = ()
    targets: Sequence[Any] = ()
    caches: Mapping[str, TensorSpec] = field(default_factory=dict)
    ranks: Ranks = ALONE
    context: Mapping[str, Namespace] = field(default_factory=dict)


@dataclass(frozen=True)
class Fallback:
    """What becomes of a linear that an algorithm cannot quantize well.

    Attributes:
        metric: ``relative_error`` of its output on calibration data.
        above: the bound beyond which it falls back.
        algorithm: quantizes it otherwise; None leaves it float.
        spec: what it becomes then; None for float.
    """

    metric: str
    above: float
    algorithm: Algorithm | None = None
    spec: QuantSpec | None = None


class Processor:
    """What an entry of ``process`` names: an algorithm, or something that stands for several entries."""

    @classmethod
    def expand(cls, config: Mapping[str, Any]) -> Sequence[Entry]:
        """The entries that this one stands for, in the order in which they run.

        Args:
            config: the entry, ``type`` included, which its JSON Schema fragment has accepted.
        """
        raise NotImplementedError


class Algorithm(Processor, ABC):
    """Does maths on a unit; knows no model family, no file format and no device.

    The engine calls, in this order: ``from_config``, ``patterns``, ``select``, ``check`` and
    ``edits`` while planning, then ``needs`` and ``apply`` for every unit.

    Attributes:
        requires: hooks of the adapter without which the algorithm cannot work.
        takes_experts: True when ``apply`` takes the linears of fused experts, an ``ExpertLinear`` for
            all experts of a layer, and answers with ``QuantizedExperts``. ``select`` sees each
            expert's linears one by one in any case. The plan refuses to give them to other algorithms.
        takes_caches: True when it quantizes key/value caches: its ``patterns`` are those of attentions, and the
            engine calls ``select_caches`` while planning and ``quantize_caches`` after ``apply``.
        rescales: True when ``apply`` changes what flows into linears without changing the model, and
            says so by ``statistics.rescale``. Later algorithms then see statistics that followed; what
            cannot follow is measured in another pass.
        shifts: True when it rescales, and subtracts a shift as well, which fewer statistics follow.
        compensates: True when it makes up for errors of earlier layers, which it can only see in
            inputs that passed them quantized: the default of ``propagation``.
        replays: True when ``apply`` runs the unit on its calibration inputs itself, as a trained
            rounding does; gradients are off around it, so it turns them on where it wants them. A module that
            it lets stand in for a linear gets ``carry_input_multiplier``.
        separable: True when ``apply`` may be called with some of the specs, all linears of one input together, and
            answers for these as it would for all: ranks that share a run then share the work. Others do it all.
        samples: how many calibration samples it wants at most, evenly spread; None for all. A run takes
            as many as its algorithms want that calibrate.
        fallback: what becomes of its linears where the result is bad; None keeps them.
        hands_over: namespaces of the context that ``apply`` writes, unit by unit, for algorithms of later stages.
            A run that continues after an interruption reads them from the disk.
        takes_over: namespaces that ``apply`` reads, and that an algorithm of an earlier stage must hand over.
    """

    rescales: bool = False
    shifts: bool = False
    compensates: bool = False
    replays: bool = False
    samples: int | None = None
    fallback: Fallback | None = None
    hands_over: frozenset[str] = frozenset()
    takes_over: frozenset[str] = frozenset()

    requires: ClassVar[frozenset[str]] = frozenset()
    takes_experts: ClassVar[bool] = False
    takes_caches: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    @classmethod
    def expand(cls, config: Mapping[str, Any]) -> Sequence[Entry]:
        """An algorithm stands for itself."""
        return [((), config)]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Algorithm:
        """Make the algorithm from its entry of ``process``, which its JSON Schema fragment has accepted.

        Args:
            config: the entry, ``type`` included.
        """

    def patterns(self) -> Sequence[Pattern]:
        """The name patterns of the configuration; the plan refuses one that matches no linear of the model."""
        return ()

    def select(self, linears: Sequence[LinearInfo]) -> Mapping[str, QuantSpec]:
        """Which linears become what, by name; empty when the algorithm quantizes nothing itself.

        Args:
            linears: all linears of the model, those outside the units included.
        """
        return {}

    def check(self, linears: Sequence[LinearInfo]) -> Sequence[Problem]:
        """What this algorithm cannot do to this model, found before a weight is read."""
        return ()

    def needs(self, unit: Unit) -> Mapping[str, frozenset[type[Statistic]]]:
        """Statistics wanted of the inputs of the unit's linears, by linear name. Empty: no calibration."""
        return {}

    def edits(self, unit: Unit) -> frozenset[str]:
        """Full names of the parameters that ``apply`` changes in place, or adds; the unit may be on meta."""
        return frozenset()

    def multiplies_inputs(self, unit: Unit) -> frozenset[str]:
        """Names of the linears to which ``apply`` gives ``multiply_inputs``; the unit may be on meta.

        The core lets quantized linears inherit the multiplier, and takes it from those that stay float.
        """
        return frozenset()

    def select_caches(self, caches: Sequence[CacheInfo]) -> Mapping[str, TensorSpec]:
        """Which caches become what, by name.

        Args:
            caches: all places where keys or values of the model enter a cache.
        """
        return {}

    def quantize_caches(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, QuantizedCache]:
        """What takes the places of the unit's caches, by name; arguments and errors as of ``apply``."""
        return {}

    @abstractmethod
    def apply(self, unit: Unit, statistics: UnitStatistics) -> Mapping[str, nn.Module]:
        """Do the work on a unit.

        Args:
            unit: the unit, weights loaded.
            statistics: what ``needs`` asked for.

        Returns:
            Modules that replace linears, by linear name.

        Raises:
            QuantizationError: the numbers do not allow it; names the linear.
        """
