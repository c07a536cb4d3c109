# SPDX-License-Identifier: Apache-2.0
"""``modelslim tune``: search for a protocol."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import click

from modelslim.cli.options import (
    device_option,
    json_option,
    model_path_option,
    model_type_option,
    option,
    quiet_option,
    save_path_option,
    trust_remote_code_option,
)
from modelslim.cli.output import Output, pass_output


@click.command()
@model_path_option
@save_path_option
@option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="YAML plan that says what is tried and how it is judged.",
)
@device_option
@option(
    "--timeout",
    default=None,
    metavar="<n>D<n>H<n>M<n>S",
    help="Begin no trial after this time, such as 1D12H or 90M.  [default: no limit]",
)
@model_type_option
@trust_remote_code_option
@option("--restart", is_flag=True, help="Begin anew what is in <save_path>.tune.  [default: continue it]")
@json_option
@quiet_option
@pass_output
def command(
    output: Output,
    model_path: Path,
    save_path: Path,
    config: Path,
    device: str | None,
    timeout: str | None,
    model_type: str | None,
    trust_remote_code: bool,
    restart: bool,
) -> None:
    """Search for a protocol, and quantize with it.

    Trials are kept in <save_path>.tune, where the same command goes on after an interruption. The chosen protocol
    lies beside the result, as protocol.yaml.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.cli.progress import progress
    from modelslim.tune.run import parse_timeout, tune

    start = time.monotonic()
    seconds = None if timeout is None else parse_timeout(timeout)
    with progress(output, "working on") as observers, redirect_stdout(sys.stderr):
        result = tune(
            model_path,
            save_path,
            config,
            device=device,
            timeout=seconds,
            model_type=model_type,
            trust_remote_code=trust_remote_code,
            restart=restart,
            observers=observers,
            say=output.note,
        )
    rows = [
        (
            f"{one['trial']}{' *' if one['trial'] == result['best'] else ''}",
            f"{one['score']:.6g}",
            "yes" if one["passed"] else "no",
            f"{one['bytes_after'] / 1e6:,.1f}",
            one["note"],
        )
        for one in result["trials"]
    ]
    output.table("", ["trial", result["metric"], "passes", "MB", ""], rows)
    output.table(
        f"Tuned in {time.monotonic() - start:.1f} s",
        ["", ""],
        [("result", str(save_path)), ("protocol", result["protocol"]), ("ended", result["ended"])],
    )
    output.data(result)
