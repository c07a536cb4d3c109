# SPDX-License-Identifier: Apache-2.0
"""``modelslim plugins``: what is installed, from where, and whether it works."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from modelslim import __version__
from modelslim.cli.options import json_option
from modelslim.cli.output import Output, pass_output
from modelslim.errors import PluginError

if TYPE_CHECKING:
    from modelslim.registry import Entry, Registry


@click.command()
@json_option
@pass_output
def command(output: Output) -> None:
    """List the installed plugins and whether they work.

    Each is imported to find out. The status is ok, incompatible (made for another version of
    modelslim), duplicate (two distributions claim the name) or broken.
    """
    from modelslim.registry import Registry

    # What a plugin prints while it is imported is not this command's result.
    with output.foreign_prints():
        registry = Registry.scan().check()
        entries = [_with_hooks_tried(row, registry) for row in registry.entries]
    output.table(
        f"modelslim {__version__}",
        ["kind", "name", "distribution", "version", "status", "why"],
        [(row.kind, row.name, row.distribution, row.version, row.status, row.reason) for row in entries],
    )
    output.data({"modelslim": __version__, "plugins": [asdict(row) for row in entries]})


def _with_hooks_tried(row: Entry, registry: Registry) -> Entry:
    """The row; of a vendor's plugin whose hooks no run would accept, marked broken."""
    from modelslim.adapters import load_vendor
    from modelslim.session import Session

    if row.kind != "plugins" or row.status != "ok":
        return row
    try:
        Session(object(), [(row.name, load_vendor(row.name, registry))])
    except PluginError as error:
        return replace(row, status="broken", reason=error.message)
    return row
