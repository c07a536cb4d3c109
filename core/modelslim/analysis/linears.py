# SPDX-License-Identifier: Apache-2.0
"""Scope ``linear``: how hard the inputs of linears are to quantize, from what one pass of the float model shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from modelslim.analysis.model import FloatModel
from modelslim.analysis.moments import Moments
from modelslim.analysis.scores import Score, rank
from modelslim.errors import UsageError, nearest
from modelslim.model_info import ModelInfo
from modelslim.patterns import matches
from modelslim.ports import Kinds, PortCollector
from modelslim.row_sample import RowSample
from modelslim.types import LinearInfo
from modelslim.unit_statistics import Port


def _std(port: Port) -> float:
    """Largest magnitude in standard deviations."""
    moments = port[Moments]
    assert isinstance(moments, Moments)
    return math.nan if moments.peak is None or not moments.std else float(moments.peak) / moments.std


def _quantile(port: Port) -> float:
    """Step of an 8-bit scale over the whole range, in distances between the quartiles."""
    moments, sample = port[Moments], port[RowSample]
    assert isinstance(moments, Moments) and isinstance(sample, RowSample)
    if moments.peak is None or sample.rows is None:
        return math.nan
    values = sample.rows.flatten().to(torch.float32).sort().values.to(torch.float64)
    low, high = (_at(values, share) for share in (0.25, 0.75))
    return 2 * float(moments.peak) / 254 / (high - low) if high > low else math.nan


def _at(ordered: torch.Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def _kurtosis(port: Port) -> float:
    """Excess kurtosis of all values."""
    moments = port[Moments]
    assert isinstance(moments, Moments)
    return moments.kurtosis


METRICS: Mapping[str, tuple[Callable[[Port], float], Kinds]] = {
    "std": (_std, frozenset({Moments})),
    "quantile": (_quantile, frozenset({Moments, RowSample})),
    "kurtosis": (_kurtosis, frozenset({Moments})),
}
"""What each metric makes of the statistics of an input, and which it wants."""


def analyze_linears(model: FloatModel, samples: Sequence[Any], metric: str, patterns: Sequence[str]) -> list[Score]:
    """Score the linears that match, the worst first.

    Args:
        model: the model.
        samples: calibration samples.
        metric: a key of ``METRICS``.
        patterns: as in ``include`` of a protocol.

    Raises:
        UsageError: a pattern matches no linear.
    """
    chosen = select_linears(model.info, patterns, "--pattern")
    score, kinds = METRICS[metric]
    by_unit: dict[str, dict[str, Kinds]] = defaultdict(dict)
    for linear in chosen:
        by_unit[linear.unit][linear.module] = kinds
    found: dict[str, float] = {}
    with torch.no_grad():
        inputs = model.inputs(samples)
        outside = _collector(model, by_unit[""])
        last = model.info.units[-1]
        with outside, closing(model.start(inputs)) as boundary:
            for unit in model.each_unit():
                ports = _collector(model, by_unit[unit])

                def passed(ports: PortCollector = ports) -> None:
                    ports.next_sample()
                    outside.next_sample()

                with ports:
                    boundary.run_unit(unit, passed, resume=unit != last or bool(by_unit[""]))
                model.release_filled()
                found.update(_scores(ports, model.info, score))
        found.update(_scores(outside, model.info, score))
    return rank(Score(linear.name, found.get(linear.name)) for linear in chosen)


def select_linears(info: ModelInfo, patterns: Sequence[str], option: str) -> list[LinearInfo]:
    """The linears that match one of the patterns.

    Raises:
        UsageError: a pattern matches none; names the option that holds it.
    """
    linears = list(info.linears.values())
    for pattern in patterns:
        if not any(matches(linear, pattern) for linear in linears):
            lasts = {linear.name.rpartition(".")[2] for linear in linears}
            raise UsageError(
                f"{option} {pattern!r} matches no linear of the model",
                hint=nearest(pattern.replace("*", "").strip("."), lasts),
            )
    return [linear for linear in linears if any(matches(linear, pattern) for pattern in patterns)]


def _collector(model: FloatModel, needs: Mapping[str, Kinds]) -> PortCollector:
    return PortCollector({name: model.model.get_submodule(name) for name in needs}, needs)


def _scores(ports: PortCollector, info: ModelInfo, score: Callable[[Port], float]) -> dict[str, float]:
    """Scores by linear; those of one port are computed once, and each expert has a port of its own."""
    done: dict[int, float] = {}

    def of(port: Port) -> float:
        if id(port) not in done:
            done[id(port)] = score(port)
        return done[id(port)]

    found = {name: of(port) for name, port in ports.ports.items()}
    for name, experts in ports.experts.items():
        for port, parts in zip(experts, info.banks[name].linears, strict=True):
            found.update((part.name, of(port)) for part in parts)
    return found
