# SPDX-License-Identifier: Apache-2.0
"""What a plan costs, and where its activations wait so that it keeps to its memory budget."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelslim.costs import Job, Layout, Machine, Phase, Place, UnitFacts, peaks, phases
from modelslim.devices import free_memory, is_host, prepares_kernels
from modelslim.errors import UsageError
from modelslim.experts import ExpertLinear
from modelslim.machines import machine_of
from modelslim.memory import Budget, in_words
from modelslim.model_info import stated_numbers
from modelslim.row_sample import RowSample
from modelslim.runners.work import count_passes
from modelslim.statistics import Gram, Statistic

if TYPE_CHECKING:
    from modelslim.plan import Plan
    from modelslim.types import LinearInfo

_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
_FREE_SHARE = 0.9
_KERNEL_BYTES, _KERNEL_VALUES = 700_000, 1 << 24  # as measured with oneDNN: a part that is fixed, and one by the weight
_KERNELS_KEPT = 1024
_WHERE = {"device": "on the device", "host": "in the computer's memory", "file": "in a file"}


@dataclass(frozen=True)
class Costs:
    """What a run is expected to cost.

    Attributes:
        job: its sizes.
        machine: the rates.
        layout: what it holds where.
        phases: its phases in order.
        device: torch device of the computation.
    """

    job: Job
    machine: Machine
    layout: Layout
    phases: Sequence[Phase]
    device: str

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes that are held at most, by place: ``host``, and the device where it has a memory of its own."""
        tops = peaks(self.phases)
        found = {"host": tops["host"].host_bytes}
        return {**found, self.device: tops["device"].device_bytes} if "device" in tops else found

    @property
    def residency(self) -> str:
        """Where activations wait and what is read ahead, in a sentence."""
        ahead = "the next unit is read ahead" if self.layout.ahead else "no unit is read ahead"
        if not self.job.samples:
            return ahead
        return f"{in_words(self.job.activation_bytes)} of activations wait {_WHERE[self.layout.activations]}, {ahead}"

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "machine": asdict(self.machine),
            "activations": self.layout.activations if self.job.samples else None,
            "activation_bytes": self.job.activation_bytes,
            "reads_ahead": self.layout.ahead,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peaks,
            "phases": [
                {
                    "name": phase.name,
                    "seconds": round(phase.seconds, 3),
                    "host_bytes": phase.host_bytes,
                    "host": dict(phase.host),
                    "device_bytes": phase.device_bytes,
                    "device": dict(phase.device),
                    "read_bytes": phase.read,
                    "written_bytes": phase.written,
                }
                for phase in self.phases
            ],
        }


def find_costs(plan: Plan) -> Costs:
    """The costs of a plan in the fastest layout that keeps to its budget.

    Raises:
        UsageError: none does; names the largest part and the remedy.
    """
    job, machine = job_of(plan), machine_of(plan.device)
    separate = not is_host(plan.device)
    whole = getattr(plan.registry.load("runners", plan.runner), "holds_model", False)
    places: tuple[Place, ...] = ("device", "host", "file") if separate else ("host", "file")
    if not job.samples:
        places = places[:1]
    found = [
        Costs(job, machine, layout, phases(job, machine, layout), plan.device)
        for layout in (Layout(place, ahead, separate, plan.ranks, whole) for place in places for ahead in (True, False))
    ]
    limits = _limits(plan.budget, plan.device, plan.ranks)
    fitting = [costs for costs in found if all(costs.peaks[place] <= limit for place, limit in limits.items())]
    if fitting:
        return min(fitting, key=lambda costs: costs.seconds)
    raise _too_little(found[-1], limits)


def _limits(budget: Budget, device: str, ranks: int) -> dict[str, int]:
    """What each process may hold by place; of a device without a size what is free."""
    limits = {} if budget.host is None else {"host": budget.host // ranks}
    if not is_host(device):
        free = free_memory(device)
        asked = budget.of(device)
        if asked is not None:
            limits[device] = asked
        elif free is not None:
            limits[device] = int(_FREE_SHARE * free)
    return limits


def _too_little(least: Costs, limits: Mapping[str, int]) -> UsageError:
    place = next(place for place, limit in limits.items() if least.peaks[place] > limit)
    top = peaks(least.phases)["host" if place == "host" else "device"]
    parts = top.host if place == "host" else top.device
    largest = max(parts, key=lambda name: parts[name])
    what = "--max_memory" if place == "host" else f"the memory of {place}"
    needed = least.peaks[place]
    return UsageError(
        f"{what} of {in_words(limits[place])} is too little: this run holds {in_words(needed)} at least, "
        f"of which {in_words(parts[largest])} are {largest}",
        hint=f"give it {-(-needed // (1 << 20))}MiB; nothing can be held elsewhere any more, and shorter "
        "calibration samples alone make what a forward needs smaller",
    )


def job_of(plan: Plan) -> Job:
    """The sizes of a run, from config.json and the headers of the weight files."""
    sizes = _Sizes(plan)
    units = [sizes.unit(name, bool(plan.samples)) for name in plan.info.units]
    outside = sizes.unit("", False) if plan.claimed("") else None
    taken = sum(unit.stored_bytes for unit in units) + (outside.stored_bytes if outside else 0)
    everything = sum(stored.nbytes for stored in plan.checkpoint.tensors.values())
    dtype: torch.dtype = getattr(torch, plan.info.dtype)
    return Job(
        units=units,
        outside_bytes=sizes.outside,
        outside=outside,
        copied_bytes=max(everything - taken, 0),
        verified_bytes=sum(unit.values for unit in (*units, *([outside] if outside else []))),
        samples=len(plan.samples),
        tokens=sum(plan.lengths),
        longest=max(plan.lengths, default=0),
        hidden_bytes=sizes.hidden * dtype.itemsize,
        item_bytes=dtype.itemsize,
        streams=2 if plan.propagates_quantized and plan.replays else 1,
        holds_outputs=plan.replays,
        replays=plan.replays,
        row_counts=max(len(set(plan.lengths)), 1),
        kernel_bytes=sizes.kernels,
        head_bytes=sizes.head * dtype.itemsize if plan.samples and plan.stage is None else 0,
        vocabulary=max((one.out_features for one in plan.info.by_unit[""]), default=0),
    )


class _Sizes:
    """Reads the sizes of units off a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._share = _share_of_experts(plan)

    @property
    def hidden(self) -> int:
        """Channels between units: what the first linear of a unit takes, of the last unit."""
        filled = (found for unit in reversed(self._plan.info.units) if (found := self._plan.info.by_unit[unit]))
        return next((linears[0].in_features for linears in filled), 0)

    @property
    def outside(self) -> int:
        """Bytes of parameters outside the units, without linears, which no sample needs before the first unit."""
        inside = tuple(f"{unit}." for unit in self._plan.info.units)
        linears = {f"{linear.name}." for linear in self._plan.info.by_unit[""]}
        return sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self._plan.model.named_parameters()
            if not name.startswith(inside) and f"{name.rpartition('.')[0]}." not in linears
        )

    @property
    def kernels(self) -> int:
        """Bytes of the kernels that libraries prepare for each number of rows and each shape of a weight."""
        dtype = getattr(torch, self._plan.info.dtype)
        if not is_host(self._plan.device) or not prepares_kernels(dtype):
            return 0
        info = self._plan.info
        linears = (linear for unit in info.units for linear in info.by_unit[unit] if not linear.bank)
        shapes = sorted({(one.in_features, one.out_features) for one in linears}, key=prod, reverse=True)
        sizes = [int(_KERNEL_BYTES + min(prod(shape), _KERNEL_VALUES) / 4) for shape in shapes]
        return sum(islice((size for size in sizes for _ in set(self._plan.lengths)), _KERNELS_KEPT))

    @property
    def head(self) -> int:
        """Values of the linears outside the units, of which a head is the largest."""
        return sum(one.out_features * one.in_features for one in self._plan.info.by_unit[""])

    def unit(self, name: str, passed: bool) -> UnitFacts:
        """One unit, or the quantized linears outside all units."""
        plan = self._plan
        linears = [one for one in plan.info.by_unit[name] if one.name in plan.specs or name]
        claimed = plan.claimed(name)
        quantized = [one for one in linears if one.name in plan.specs]
        # All of a unit is read to run it, else what is quantized.
        names = plan.loader.names(name) if passed else [one for module in claimed for one in plan.loader.names(module)]
        keys = {key for one in names for key in plan.loader.source(one).keys}
        stored = {key: plan.checkpoint.tensors[key].nbytes for key in keys}
        encoded = (
            plan.saver.encoded_sizes(plan.planned.linears[one.name], plan.specs[one.name], plan.info.dtype)
            for one in quantized
        )
        written = sum(sum(sizes.values()) for sizes in encoded)
        needs = list(self._needs(name)) if plan.samples else []
        grams = [(module, share) for module, share, kinds in needs if Gram in kinds]
        return UnitFacts(
            name=name or "outside the units",
            stored_bytes=sum(stored.values()),
            held_bytes=sum(_nbytes(plan.loader.parameters[one]) for one in names),
            result_bytes=written + sum(nbytes for key, nbytes in stored.items() if key not in plan.replaced),
            values=sum(one.out_features * one.in_features for one in quantized),
            largest=max((one.out_features * one.in_features for one in linears), default=0),
            macs=int(sum(one.out_features * one.in_features * self._active(one) for one in linears)),
            width=int(sum((one.out_features + one.in_features) * self._active(one) for one in linears)),
            statistics_bytes=sum(_statistic_bytes(kind, module) for module, _, kinds in needs for kind in kinds),
            gram_cubes=sum(
                _experts(one) * (one.in_features**3 + 2 * one.in_features**2 * one.out_features) for one, _ in grams
            ),
            gram_updates=int(sum(_experts(one) * share * one.in_features**2 for one, share in grams)),
            largest_gram=max((one.in_features**2 for one, _ in grams), default=0),
            passes=count_passes(plan, name) if name else int(bool(needs)),
            linears=len(claimed),
        )

    def _active(self, linear: LinearInfo) -> float:
        """The share of tokens that a linear sees."""
        return self._share if linear.bank or _EXPERT.search(linear.name) else 1.0

    def _needs(self, name: str) -> Iterator[tuple[Any, float, frozenset[type[Statistic]]]]:
        """What is measured at which module of a unit, which sees so large a share of the tokens."""
        kinds: dict[str, frozenset[type[Statistic]]] = {}
        modules: dict[str, nn.Module] = {}
        for step in self._plan.steps:
            view = step.unit(name, self._plan.model)
            modules = {**view.modules, **view.linears}
            for module, wanted in step.algorithm.needs(view).items():
                kinds[module] = kinds.get(module, frozenset({RowSample})) | wanted
        for module, wanted in kinds.items():
            if hasattr(modules[module], "in_features"):
                is_expert = isinstance(modules[module], ExpertLinear) or _EXPERT.search(module)
                yield modules[module], self._share if is_expert else 1.0, wanted


def _share_of_experts(plan: Plan) -> float:
    """Which share of a layer's experts a token meets, by what config.json says; 1 where it says nothing."""
    chosen = next(stated_numbers(plan.checkpoint.config, _EXPERTS_PER_TOKEN), None)
    counts = [len(bank.linears) for bank in plan.info.banks.values()]
    if not counts:
        first = (name for name in plan.info.linears if _EXPERT.search(name))
        layer = _EXPERT.split(next(first, ""))[0]
        counts = [len({_EXPERT.findall(name)[0] for name in plan.info.linears if name.startswith(f"{layer}.experts.")})]
    return min(chosen / counts[0], 1.0) if chosen and counts[0] else 1.0


def _experts(module: nn.Module) -> int:
    return module.experts if isinstance(module, ExpertLinear) else 1


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _statistic_bytes(kind: type[Statistic], module: Any) -> int:
    """Bytes of a statistic at the input of a linear, or of all experts; at most 16 a channel where it is not known."""
    experts, channels = _experts(module), module.in_features
    if issubclass(kind, Gram):
        return int(experts * 4 * channels * channels)
    if issubclass(kind, RowSample):
        return int(4 * kind.capacity * channels * (1 if experts == 1 else 8))
    return int(experts * 16 * channels)
