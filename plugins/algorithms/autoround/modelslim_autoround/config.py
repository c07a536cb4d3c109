# SPDX-License-Identifier: Apache-2.0
"""The configuration of ``autoround_quant``, as ``autoround_quant.schema.json`` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelslim.api import QuantSpec, Selector, parse_qconfig


@dataclass(frozen=True)
class Strategy:
    """Some linears and what they become.

    Attributes:
        selector: which linears.
        spec: what they become.
    """

    selector: Selector
    spec: QuantSpec


@dataclass(frozen=True)
class Training:
    """How the rounding of a unit is trained.

    Attributes:
        iters: steps of the descent; 0 rounds to nearest.
        lr: length of the first step of the offsets; later ones are shorter, down to 0.
        minmax_lr: the same for the multipliers of the ranges.
        round_tuning: whether offsets are trained.
        minmax_tuning: whether multipliers are.
        batch_size: samples for each step.
        samples: how many calibration samples are used at most, spread evenly; static ranges come from all.
        start: where the descent begins: ``minmax``, ``mse`` or ``gptq``.
        seed: of the order of the samples.
    """

    iters: int = 10
    lr: float = 0.01
    minmax_lr: float = 0.002
    round_tuning: bool = True
    minmax_tuning: bool = True
    batch_size: int = 1
    samples: int = 32
    start: str = "gptq"
    seed: int = 42

    @property
    def trains(self) -> bool:
        """True when there is anything to descend."""
        return self.iters > 0 and (self.round_tuning or self.minmax_tuning)


@dataclass(frozen=True)
class AutoRoundConfig:
    """What to quantize, to what, and how to train it.

    Attributes:
        strategies: of those that name a linear the first one counts.
        training: see there.
    """

    strategies: tuple[Strategy, ...]
    training: Training = Training()

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> AutoRoundConfig:
        """Read an entry of ``process`` that its schema has accepted, filling in the defaults."""
        default = Training()
        return cls(
            tuple(_strategy(one) for one in entry["strategies"]),
            Training(
                entry.get("iters", default.iters),
                entry.get("lr", default.lr),
                entry.get("minmax_lr", default.minmax_lr),
                entry.get("enable_round_tuning", default.round_tuning),
                entry.get("enable_minmax_tuning", default.minmax_tuning),
                entry.get("batch_size", default.batch_size),
                entry.get("samples", default.samples),
                entry.get("start", default.start),
                entry.get("seed", default.seed),
            ),
        )


def _strategy(strategy: Mapping[str, Any]) -> Strategy:
    return Strategy(
        Selector(tuple(strategy.get("include", ("*",))), tuple(strategy.get("exclude", ()))),
        parse_qconfig(strategy["qconfig"]),
    )
