# SPDX-License-Identifier: Apache-2.0
"""Scores of the parts of a model, ranked, and the patterns that name the worst of them in a protocol."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_MOST = 500  # alternatives of one pattern; the library that expands braces stops at 1000
_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.\d+\.[^.]+")
_FIRST_NUMBER = re.compile(r"(?P<before>(?:[^.]*[^.0-9][^.]*\.)*)(?P<number>\d+)(?P<behind>(?:\..*)?)")


@dataclass(frozen=True)
class Score:
    """How much a part of the model is expected to suffer.

    Attributes:
        name: of the linear, unit or attention.
        score: the metric, larger is worse; None where no token came.
    """

    name: str
    score: float | None


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        scope: ``linear``, ``layer`` or ``attn``.
        metric: what the scores are.
        dataset: the calibration set.
        samples: how many of its samples were taken.
        scores: the worst first; parts without a score last.
        exclude: patterns of the worst ones, for ``exclude`` of a protocol.
        warnings: what the user should know.
    """

    scope: str
    metric: str
    dataset: str
    samples: int
    scores: Sequence[Score]
    exclude: Sequence[str]
    warnings: Sequence[str]

    def ranked(self) -> list[tuple[int, Score]]:
        """Scores with their ranks, counted from 1; equal scores, such as those of one input, share a rank."""
        result: list[tuple[int, Score]] = []
        for score in self.scores:
            same = bool(result) and result[-1][1].score == score.score
            result.append((result[-1][0] if same else (result[-1][0] + 1 if result else 1), score))
        return result

    def as_data(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "scope": self.scope,
            "metric": self.metric,
            "dataset": self.dataset,
            "samples": self.samples,
            "scores": [{"rank": rank, "name": one.name, "score": one.score} for rank, one in self.ranked()],
            "exclude": list(self.exclude),
            "warnings": list(self.warnings),
        }


def rank(scores: Iterable[Score]) -> list[Score]:
    """The worst first; equal ones stay in the order of the model, those without a score come last."""
    finite = [one if one.score is None or math.isfinite(one.score) else Score(one.name, None) for one in scores]
    return sorted(finite, key=lambda one: -math.inf if one.score is None else one.score, reverse=True)


def worst(scores: Sequence[Score], topk: int) -> list[str]:
    """Names of the worst parts: those with one of the ``topk`` largest scores."""
    levels = list(dict.fromkeys(one.score for one in scores if one.score is not None))[:topk]
    return [one.name for one in scores if one.score in levels and one.score is not None]


def as_patterns(names: Collection[str], everything: Collection[str]) -> list[str]:
    """Few patterns that match these names of linears and no other.

    Layers become alternatives in braces, and so do linears of the same layers:
    ``model.layers.{3,7}.self_attn.{q_proj,k_proj,v_proj}``. Experts of which all are meant become
    ``model.layers.3.mlp.experts.*``.

    Args:
        names: the linears that are meant.
        everything: all linears of the model.
    """
    rest = set(everything) - set(names)
    broken = {match["experts"] for name in rest if (match := _EXPERTS.fullmatch(name))}
    short: dict[str, None] = {}
    for name in names:
        match = _EXPERTS.fullmatch(name)
        short[f"{match['experts']}.*" if match and match["experts"] not in broken else name] = None
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    patterns: list[str] = []
    for name in short:
        match = _FIRST_NUMBER.fullmatch(name)
        if match:
            layers[match["before"], match["behind"]].append(match["number"])
        else:
            patterns.append(name)
    siblings: dict[tuple[str, tuple[str, ...], str], list[str]] = defaultdict(list)
    for (before, behind), numbers in layers.items():
        parent, _, last = behind.rpartition(".")
        siblings[before, tuple(sorted(set(numbers), key=int)), parent].append(last)
    for (before, layer_numbers, parent), lasts in siblings.items():
        for chunk in _chunks(layer_numbers, max(1, _MOST // len(lasts))):
            if all(lasts):
                patterns.append(f"{before}{_either(chunk)}{parent}.{_either(lasts)}")
            else:
                patterns.append(f"{before}{_either(chunk)}")
    return patterns


def _chunks(items: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"
