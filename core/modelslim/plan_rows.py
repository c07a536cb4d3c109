# SPDX-License-Identifier: Apache-2.0
"""What becomes of every weight, by which line of the protocol and at which size; layers that are alike are one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from modelslim.module_sizes import star
from modelslim.patterns import matches
from modelslim.plan import Plan
from modelslim.protocol.document import format_path
from modelslim.types import LinearInfo

_WHY_KEPT = {
    "router": "a router; engines have no quantized ones",
    "stacked experts": "experts that the adapter cannot take apart",
    "no linear": "not a linear module; copied as it is",
}


@dataclass(frozen=True)
class Row:
    """Linears, or other weights, that share a name pattern and a fate.

    Attributes:
        pattern: their name with layer numbers as ``*``.
        layers: numbers of the units that hold them, such as ``0-2, 5``; empty outside the units.
        count: how many there are.
        shape: shape of the weight.
        scheme: what they become, ``FLOAT`` when nothing.
        why: the entry of the protocol that says so, with its line, or why they stay float.
        bytes_before: what they take in the source, with biases and scales.
        bytes_after: what they take in the result.
        bits: bits per weight in the result, scales and biases included; None where another weight stands for them.
    """

    pattern: str
    layers: str
    count: int
    shape: tuple[int, ...]
    scheme: str
    why: str
    bytes_before: int
    bytes_after: int
    bits: float | None


def rows(plan: Plan) -> list[Row]:
    """The plan's weights, grouped, in the model's order."""
    grouped: dict[tuple[Any, ...], list[tuple[str, float, float]]] = {}
    for name, unit, shape, scheme, why, before, after in _weights(plan):
        grouped.setdefault((star(name), shape, scheme, why), []).append((unit, before, after))
    found = []
    for (pattern, shape, scheme, why), members in grouped.items():
        before, after = round(sum(one for _, one, _ in members)), round(sum(one for _, _, one in members))
        bits = round(8 * after / (len(members) * prod(shape)), 2) if before else None
        layers = _ranges(_number(unit) for unit, _, _ in members)
        found.append(Row(pattern, layers, len(members), shape, scheme, why, before, after, bits))
    return found


def bits_per_weight(found: Iterable[Row]) -> dict[str, float | None]:
    """Bits per weight of all that rows hold and that is stored: before, after, and after of what is quantized alone."""
    all_rows = [row for row in found if row.bytes_before]
    quantized = [row for row in all_rows if row.scheme != "FLOAT"]
    return {
        "before": _bits(all_rows, "bytes_before"),
        "after": _bits(all_rows, "bytes_after"),
        "quantized": _bits(quantized, "bytes_after"),
    }


def _bits(found: Iterable[Row], size: str) -> float | None:
    kept = list(found)
    weights = sum(row.count * prod(row.shape) for row in kept)
    return round(8 * sum(getattr(row, size) for row in kept) / weights, 2) if weights else None


def _weights(plan: Plan) -> Iterator[tuple[str, str, tuple[int, ...], str, str, float, float]]:
    """Name, unit, shape, scheme, why, bytes before and after of every weight that a row may hold."""
    reasons = _Reasons(plan)
    together: dict[str, int] = {}
    for linear in plan.info.linears.values():
        together[linear.module] = together.get(linear.module, 0) + linear.out_features * linear.in_features
    for name, linear in plan.info.linears.items():
        spec = plan.specs.get(name)
        # Experts of one layer may lie in one tensor, of which each has its share.
        share = linear.out_features * linear.in_features / together[linear.module]
        before = share * _bytes(plan, linear.module, plan.checkpoint.stored_bytes)
        if spec is None:
            after = share * _bytes(plan, linear.module, _float_bytes(plan))
        else:
            after = sum(plan.saver.encoded_sizes(plan.planned.linears[name], spec, plan.info.dtype).values())
        shape = (linear.out_features, linear.in_features)
        yield name, linear.unit, shape, spec.scheme if spec else "FLOAT", reasons.why(linear), before, after
    units = sorted(plan.info.units, key=len, reverse=True)
    for name, kept in plan.info.kept.items():
        keys = plan.stored_keys(name)
        before, after = (sum(map(size, keys)) for size in (plan.checkpoint.stored_bytes, _float_bytes(plan)))
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        yield name, unit, kept.shape, "FLOAT", _WHY_KEPT[kept.why], before, after


def _bytes(plan: Plan, module: str, size: Any) -> int:
    return sum(size(key) for part in ("weight", "bias") for key in plan.stored_keys(f"{module}.{part}"))


def _float_bytes(plan: Plan) -> Any:
    return lambda key: plan.checkpoint.tensors[key].nbytes


class _Reasons:
    """Why a linear becomes what it becomes, with the line of the protocol."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._steps = [step for stage in plan.stages for step in stage.steps]
        self._origin = {name: origin(plan, step.path) for step in self._steps for name in step.specs}

    def why(self, linear: LinearInfo) -> str:
        """The entry that quantizes it, the pattern that excludes it, or what else keeps it float."""
        if linear.name in self._origin:
            return self._origin[linear.name]
        for place, pattern in self._excludes:
            if matches(linear, pattern):
                return f"excluded by {pattern!r}, {place}"
        if not self._plan.stored_keys(f"{linear.module}.weight"):
            return "not stored: it is tied to another weight"
        return "no entry selects it" if linear.unit else "outside the layers; name it outright to quantize it"

    @cached_property
    def _excludes(self) -> list[tuple[str, str]]:
        return [
            (origin(self._plan, (*step.path, *path)), pattern)
            for step in self._steps
            if step.specs
            for path, pattern in step.algorithm.patterns()
            if path[0] == "exclude"
        ]


def origin(plan: Plan, path: Iterable[str | int]) -> str:
    """A place of the protocol with its line."""
    place = tuple(path)
    line, _ = plan.protocol.document.position(place)
    return f"{format_path(place)}, line {line}"


def _number(unit: str) -> int | None:
    """The last number in a unit's name; None when there is none."""
    found = re.findall(r"(?<=\.)\d+(?=\.|$)", unit)
    return int(found[-1]) if found else None


def _ranges(numbers: Iterable[int | None]) -> str:
    """``0-2, 5`` of 0, 1, 2 and 5."""
    parts: list[list[int]] = []
    for number in sorted({number for number in numbers if number is not None}):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def verdicts(plan: Plan) -> list[dict[str, Any]]:
    """What engines make of the result: of each the newest version that is known, or the one that was asked for.

    Returns:
        Objects with ``engine``, ``loads`` (None where nothing speaks against it and not all rules are known), the
        broken ``rules`` and the ``problems`` in words.
    """
    from modelslim.engine_rules import Target, find_problems
    from modelslim.engines import read_contracts

    newest = {contract.engine: contract for contract in read_contracts(plan.registry)}
    if plan.target is not None:
        newest[plan.target.contract.engine] = plan.target.contract
    tp = plan.target.tp if plan.target else 1
    saver = plan.protocol.save[0].type
    found: list[dict[str, Any]] = []
    for contract in newest.values():
        problems = find_problems(Target(contract, tp, asked=True), saver, plan.planned)
        messages = [problem.message for problem in problems]
        rules = dict.fromkeys(rule for text in messages for rule in re.findall(r": (\w+)\]$", text))
        is_known = saver not in contract.formats or contract.formats[saver].schemes is not None
        loads = False if problems else True if is_known else None
        found.append({"engine": contract.name, "loads": loads, "rules": list(rules), "problems": messages})
    return found
