# SPDX-License-Identifier: Apache-2.0
"""``modelslim analyze``: what of a model suffers most from quantization."""

from __future__ import annotations

import csv
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelslim.cli.options import (
    device_option,
    json_option,
    model_path_option,
    model_type_option,
    option,
    quiet_option,
    trust_remote_code_option,
)
from modelslim.cli.output import Output, pass_output
from modelslim.errors import SaveError, UsageError

if TYPE_CHECKING:
    from modelslim.analysis.scores import Analysis

_METRICS = ("kurtosis", "std", "quantile", "mse_layer_wise", "mse_model_wise", "mse")


@click.command()
@click.argument("scope", type=click.Choice(["linear", "layer", "attn"]))
@model_path_option
@model_type_option
@device_option
@option(
    "--calib_dataset",
    default="mix_calib.jsonl",
    show_default=True,
    help="Calibration set: the name of a shipped one, or a path.",
)
@option(
    "--metrics",
    type=click.Choice(_METRICS),
    default=None,
    help="linear: kurtosis, std, quantile. layer: mse_layer_wise, mse_model_wise. attn: mse.  [default: the first]",
)
@option("--topk", type=click.IntRange(min=1), default=15, show_default=True, help="Scores in the exclude list.")
@option(
    "--pattern",
    multiple=True,
    default=("*",),
    show_default=True,
    help="linear: which linears, as in include of a protocol; may be given several times.",
)
@option(
    "--quant_modules",
    multiple=True,
    default=("*",),
    show_default=True,
    help="layer: which linears are quantized; may be given several times.",
)
@option("--csv", "table", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Write all scores here.")
@option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Draw all scores into this file: .png, .svg or .pdf. Needs matplotlib.",
)
@trust_remote_code_option
@json_option
@quiet_option
@pass_output
def command(
    output: Output,
    scope: str,
    model_path: Path,
    model_type: str | None,
    device: str | None,
    calib_dataset: str,
    metrics: str | None,
    topk: int,
    pattern: tuple[str, ...],
    quant_modules: tuple[str, ...],
    table: Path | None,
    plot: Path | None,
    trust_remote_code: bool,
) -> None:
    """Find out what of a model suffers most from quantization.

    SCOPE is linear (inputs of linears), layer (units that are quantized alone) or attn (attentions whose keys and
    values are rounded). The result is a ranking, and a list for exclude of a protocol. Nothing is written but what
    --csv and --plot name.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.analysis.plot import draw, require_plotting
    from modelslim.analysis.run import analyze
    from modelslim.cli.progress import progress

    if plot is not None:
        require_plotting(plot)
    if table is not None and not table.parent.is_dir():
        raise UsageError(f"--csv {table}: there is no directory {table.parent}", hint="make it first")
    start = time.monotonic()
    with progress(output, "measuring") as observers, redirect_stdout(sys.stderr):
        result = analyze(
            model_path,
            scope,
            metric=metrics,
            dataset=calib_dataset,
            topk=topk,
            pattern=pattern,
            quant_modules=quant_modules,
            device=device,
            model_type=model_type,
            trust_remote_code=trust_remote_code,
            observers=observers,
        )
    for warning in result.warnings:
        output.warn(warning)
    if table is not None:
        _write_csv(table, result)
    if plot is not None:
        draw(result, plot)
    rows = [(rank, one.name, "" if one.score is None else f"{one.score:.6g}") for rank, one in result.ranked()]
    shown = [row for row in rows if row[0] <= topk]
    output.note(f"measured {len(rows)} parts on {result.samples} samples in {time.monotonic() - start:.1f} s")
    output.table(f"{scope}: {result.metric}", ["", "name", "score"], shown)
    output.table("", [""], [("exclude:",), *((f'  - "{one}"',) for one in result.exclude)])
    output.data(result.as_data())


def _write_csv(file: Path, result: Analysis) -> None:
    """One line per part: rank, name, score; an empty score where no token came."""
    try:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["rank", "name", "score"])
            writer.writerows((rank, one.name, "" if one.score is None else one.score) for rank, one in result.ranked())
    except OSError as error:
        raise SaveError(f"{file}: {error.strerror}", hint="choose another place for --csv") from error
