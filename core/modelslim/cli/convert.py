# SPDX-License-Identifier: Apache-2.0
"""``modelslim convert``: from one format into another, without calibration."""

from __future__ import annotations

import time
from pathlib import Path

import click

from modelslim.cli.hints import ExistingPath, about_folder
from modelslim.cli.options import (
    engine_option,
    json_option,
    option,
    quiet_option,
    save_path_option,
    tp_option,
    trust_remote_code_option,
    verify_option,
)
from modelslim.cli.output import Output, pass_output


@click.command()
@click.argument("path", type=ExistingPath(folder=True, advise=about_folder))
@save_path_option
@option(
    "--to",
    required=True,
    help="Name of the saver that writes the result, as in the YAML protocol, such as compressed_tensors_saver; or "
    "float, for plain weights in the model's dtype.",
)
@option(
    "--part_file_size",
    type=click.FloatRange(min=0),
    default=None,
    help="GiB after which a new weight file begins; 0 puts all into one.  [default: the saver's]",
)
@option(
    "--round_scales",
    is_flag=True,
    help="Round scales that the engine of the result holds in fewer bits, in bfloat16 by up to 0.4 %; else refuse.",
)
@engine_option
@tp_option
@trust_remote_code_option
@verify_option
@json_option
@quiet_option
@pass_output
def command(
    output: Output,
    path: Path,
    save_path: Path,
    to: str,
    part_file_size: float | None,
    round_scales: bool,
    engine: str | None,
    tp: int,
    trust_remote_code: bool,
    check: bool,
) -> None:
    """Convert a quantized model into another format, without loss.

    PATH is the folder of a quantized model: of the format of an installed saver, or one that the
    model's adapter decodes, such as float8 in blocks. Codes and scales stay what they are; what the
    other format would round or lose is refused before anything is written.
    """
    convert_and_show(
        output,
        path,
        save_path,
        to,
        part_file_size=part_file_size,
        engine=engine,
        tp=tp,
        trust_remote_code=trust_remote_code,
        check=check,
        round_scales=round_scales,
    )


def convert_and_show(
    output: Output,
    path: Path,
    save_path: Path,
    to: str,
    *,
    part_file_size: float | None,
    engine: str | None,
    tp: int,
    trust_remote_code: bool,
    check: bool,
    round_scales: bool = False,
) -> None:
    """Convert, and tell people and programs about it; arguments as of ``modelslim.convert.convert``."""
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.cli.progress import progress
    from modelslim.convert import convert

    start = time.monotonic()
    # What a plugin prints is not this command's result.
    with progress(output, "converting") as observers, output.foreign_prints():
        report = convert(
            path,
            save_path,
            to,
            part_file_size=part_file_size,
            engine=engine,
            tp=tp,
            trust_remote_code=trust_remote_code,
            check=check,
            round_scales=round_scales,
            observers=observers,
        )
    for warning in report["warnings"]:
        output.warn(warning)
    schemes = [f"{count} linears {scheme}" for scheme, count in report["schemes"].items()]
    if report["decoded"]:
        schemes.append(f"{report['decoded']} weights that the adapter decodes")
    rows = [
        ("result", report["save_path"]),
        ("from", f"{report['from']}: {', '.join(schemes)}" if report["from"] else ", ".join(schemes)),
        ("to", report["to"]),
        ("size", f"{report['bytes_before'] / 1e6:,.1f} MB -> {report['bytes_after'] / 1e6:,.1f} MB"),
    ]
    output.table(f"Converted in {time.monotonic() - start:.1f} s", ["", ""], rows)
    output.data(report)
