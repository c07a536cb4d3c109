# SPDX-License-Identifier: Apache-2.0
"""``modelslim schema``: the JSON Schema of the protocol with the fragments of the installed plugins."""

from __future__ import annotations

import click

from modelslim.cli.options import option
from modelslim.cli.output import Output, pass_output


@click.command()
@option("--apiversion", default="modelslim_v1", show_default=True, help="Version of the protocol.")
@pass_output
def command(output: Output, apiversion: str) -> None:
    """Print the JSON Schema of the YAML protocol.

    It covers the algorithms and savers that are installed here. Editors that know JSON Schema
    complete and check a protocol with it.
    """
    from modelslim.protocol.compose import compose
    from modelslim.registry import Registry

    output.document(compose(apiversion, Registry.scan()))
