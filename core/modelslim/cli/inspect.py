# SPDX-License-Identifier: Apache-2.0
"""``modelslim inspect``: what ``quant --debug`` kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelslim.cli.hints import ExistingPath, about_folder
from modelslim.cli.options import json_option
from modelslim.cli.output import Output, pass_output
from modelslim.errors import UsageError, nearest


@click.command()
@click.argument("path", type=ExistingPath(folder=True, advise=about_folder))
@click.argument("pattern", default="")
@json_option
@pass_output
def command(output: Output, path: Path, pattern: str) -> None:
    """Show scales, ranges and decisions that quant --debug kept.

    PATH is the folder that quant wrote. PATTERN selects linears as patterns of the protocol do, such
    as '*layers.3.*o_proj'; with a slash it selects tensors, such as '*/input_scale'. Tensors are
    summed up and are shown where a PATTERN is given.
    """
    from modelslim.debug_info import read

    found = read(path, pattern or "*")
    if not found["linears"] and not found["tensors"]:
        names = [*read(path)["linears"], *(name.rpartition(".")[2] for name in read(path)["linears"])]
        raise UsageError(f"{pattern!r} matches nothing that was kept", hint=nearest(pattern, names))
    if found["linears"] and "/" not in pattern:
        rows = [(name, one["scheme"], _error(one), _decision(one)) for name, one in found["linears"].items()]
        output.table("", ["linear", "scheme", "relative error", "decisions"], rows)
    if pattern and found["tensors"]:
        output.table(
            "", ["tensor", "dtype", "shape", "minimum", "mean", "maximum"], map(_row, found["tensors"].items())
        )
    output.data(found)


def _error(linear: Mapping[str, Any]) -> str:
    return f"{linear['quality']['relative_error']:.4f}" if "quality" in linear else ""


def _decision(linear: Mapping[str, Any]) -> str:
    said = list(linear.get("notes", ()))
    if fate := linear.get("fell_back"):
        said.insert(0, f"fell back from {fate['from']} to {fate['to']}")
    return "; ".join(said)


def _row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, one = item
    numbers = (_number(one[word]) if word in one else "" for word in ("minimum", "mean", "maximum"))
    return (name, one["dtype"], " x ".join(map(str, one["shape"])) or "1", *numbers)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
