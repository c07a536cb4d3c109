# SPDX-License-Identifier: Apache-2.0
"""``qconfig``: what an entry of ``process`` says of weights and inputs, read the same way by every algorithm.

A dtype is a word of ``modelslim.types.BITS``; which of them an algorithm takes is said by its JSON Schema
fragment, and which a format can store by its saver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modelslim.types import FLOAT, MICROSCALING, LinearInfo, Problem, QuantSpec, TensorSpec

GROUP_SIZE = 128
"""Inputs per group where the scope is ``per_group`` and no size is given."""

BLOCK = 128
"""Rows and columns of a block of float8, and columns of one of its inputs."""


def parse_qconfig(qconfig: Mapping[str, Any]) -> QuantSpec:
    """What ``{weight: {...}, act: {...}}`` makes of a linear; without ``act`` inputs stay float.

    Args:
        qconfig: as the fragment of the algorithm has accepted it. Read are ``dtype``, ``scope``, ``symmetric``
            and ``group_size``, and of ``method`` only whether it is ``none``; methods are the algorithm's own.
    """
    return QuantSpec(parse_weight(qconfig["weight"]), parse_activation(qconfig.get("act")))


def parse_weight(leaf: Mapping[str, Any]) -> TensorSpec:
    """What ``weight`` says. Left out: int8, per_channel, symmetric; of a dtype with blocks of its own per_block.

    ``group_size`` may stand in ``ext``, where older protocols have it.
    """
    dtype = leaf.get("dtype", "int8")
    scope = leaf.get("scope", "per_block" if dtype in MICROSCALING else "per_channel")
    if scope == "per_block":
        rows = 1 if dtype in MICROSCALING else BLOCK
        return TensorSpec(dtype, scope, True, MICROSCALING.get(dtype, BLOCK), group_rows=rows)
    group_size = leaf.get("group_size", leaf.get("ext", {}).get("group_size", GROUP_SIZE))
    return TensorSpec(dtype, scope, leaf.get("symmetric", True), group_size if scope == "per_group" else None)


def parse_activation(leaf: Mapping[str, Any] | None) -> TensorSpec:
    """What ``act`` says. Left out: int8, per_tensor; with an offset when it is int8 and its scale static."""
    if leaf is None or leaf.get("dtype", "int8") == "float" or leaf.get("method") == "none":
        return FLOAT
    dtype = leaf.get("dtype", "int8")
    scope = leaf.get("scope", "per_block" if dtype in MICROSCALING else "per_tensor")
    if scope == "per_block":
        return TensorSpec(dtype, scope, True, MICROSCALING.get(dtype, BLOCK))
    has_offset = dtype == "int8" and scope in ("per_tensor", "pd_mix")
    return TensorSpec(dtype, scope, leaf.get("symmetric", not has_offset))


def check_group_sizes(chosen: Iterable[tuple[LinearInfo, TensorSpec]], path: tuple[str | int, ...]) -> list[Problem]:
    """Refuse group sizes that do not divide the inputs of a linear; equal faults are one problem.

    Args:
        chosen: linears with what their weights become.
        path: where the entry says so.
    """
    odd: dict[tuple[TensorSpec, int], list[str]] = {}
    for linear, spec in chosen:
        # Blocks of several rows may be smaller at the edges.
        if spec.group_size is not None and spec.group_rows == 1 and linear.in_features % spec.group_size:
            odd.setdefault((spec, linear.in_features), []).append(linear.name)
    return [
        Problem(
            f"group_size {spec.group_size} does not divide the {inputs} inputs of {names[0]}"
            + (f" and {len(names) - 1} others" if len(names) > 1 else ""),
            hint=f"{spec.dtype} has blocks of this size; exclude them, or use another dtype"
            if spec.dtype in MICROSCALING
            else f"sizes that do: {', '.join(map(str, _divisors(inputs)))}",
            path=path,
        )
        for (spec, inputs), names in odd.items()
    ]


def _divisors(number: int) -> list[int]:
    """The group sizes worth offering: powers of two from 32, which hardware likes, else all from 16 on."""
    powers = [size for size in (32, 64, 128, 256, 512) if number % size == 0]
    return powers or [size for size in range(min(16, number), number + 1) if number % size == 0]
