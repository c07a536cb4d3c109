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
    report = _read(source)
    file = write_page(report, target.parent, target.name)
    output.table("", ["", ""], [("report", source), ("page", file), *_kl_rows(report)])
    output.data({"report": str(source), "page": str(file), "kl": report.get("kl")})


def _kl_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """KL of the whole, the layers that add most to it, and what is to be known of it."""
    kl = report.get("kl") or {"units": {}, "notes": []}
    found = list(kl["units"].items())
    rows = [("KL per layer", f"not measured: {note}") for note in kl["notes"] if not found]
    if found:
        before = [0.0, *(value for _, value in found)]
        added = sorted(((value - less, unit) for (unit, value), less in zip(found, before, strict=False)), reverse=True)
        most = ", ".join(f"{unit} +{value:.3g}" for value, unit in added[:3] if value > 0)
        where = f"behind {found[-1][0]}, at {kl['positions']} positions"
        rows.append(
            ("KL per layer", f"{found[-1][1]:.3g} nats {where}" + (f"; most is added by {most}" if most else ""))
        )
    return rows


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
