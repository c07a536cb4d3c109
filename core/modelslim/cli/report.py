# SPDX-License-Identifier: Apache-2.0
"""``modelslim report``: the page of a report, made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from modelslim.cli.options import json_option, option
from modelslim.cli.output import Output, pass_output
from modelslim.errors import UsageError


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@option(
    "--output",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="File to write.  [default: report.html beside report.json]",
)
@json_option
@pass_output
def command(output: Output, path: Path, target: Path | None) -> None:
    """Make report.html anew from report.json.

    PATH is the folder that quant or convert wrote, or its report.json. The page needs no network
    and no other file.
    """
    from modelslim.report import REPORT
    from modelslim.report_page import PAGE, write_page

    source = path / REPORT if path.is_dir() else path
    target = target or source.parent / PAGE
    file = write_page(_read(source), target.parent, target.name)
    output.table("", ["", ""], [("report", source), ("page", file)])
    output.data({"report": str(source), "page": str(file)})


def _read(file: Path) -> dict[str, Any]:
    """A report.

    Raises:
        UsageError: it is none.
    """
    hint = "PATH is the folder that quant or convert wrote, or its report.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file} is not there", hint=hint) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}", hint=hint) from error
    if not isinstance(value, dict) or value.get("report") != 1 or "bytes_after" not in value:
        raise UsageError(f"{file} is no report of modelslim", hint=hint)
    return value
