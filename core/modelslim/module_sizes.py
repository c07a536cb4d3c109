# SPDX-License-Identifier: Apache-2.0
"""Bytes before and after, by module: layers that are alike are one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def star(name: str) -> str:
    """A name with numbers of layers and experts as ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def module_sizes(
    before: Mapping[str, int], after: Mapping[str, int], schemes: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Rows of ``module``, ``schemes`` (linears by scheme), ``bytes_before`` and ``bytes_after``; the largest first.

    Args:
        before: bytes of the source's tensors by name.
        after: bytes of the result's.
        schemes: stored names of quantized linears, with what they became.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, nbytes in before.items():
        _row(rows, _module(name))["bytes_before"] += nbytes
    known = frozenset(rows)
    for name, nbytes in after.items():
        _row(rows, _at_home(_module(name), known))["bytes_after"] += nbytes
    for name, scheme in schemes:
        counts = _row(rows, _at_home(star(name), known))["schemes"]
        counts[scheme] = counts.get(scheme, 0) + 1
    return sorted(rows.values(), key=lambda row: -max(row["bytes_before"], row["bytes_after"]))


def _row(rows: dict[str, dict[str, Any]], module: str) -> dict[str, Any]:
    return rows.setdefault(module, {"module": module, "schemes": {}, "bytes_before": 0, "bytes_after": 0})


def _module(tensor: str) -> str:
    """The module of a tensor; a tensor without a dot stands for itself."""
    return star(tensor.rpartition(".")[0] or tensor)


def _at_home(module: str, known: frozenset[str]) -> str:
    """The nearest module around that the source has: it may hold in one tensor what the result has in many."""
    around = module
    while around and around not in known:
        around = around.rpartition(".")[0]
    return around or module
