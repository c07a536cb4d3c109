# SPDX-License-Identifier: Apache-2.0
"""The program ``modelslim``: finds the command, imports it, turns errors into words and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import click

from modelslim import __version__
from modelslim.cli.errors import DONE, exit_code, wants_traceback
from modelslim.cli.output import Output
from modelslim.cli.signals import orderly_end
from modelslim.errors import UsageError, nearest

COMMANDS: Mapping[str, str] = {
    "quant": "Quantize a model and write the result.",
    "plan": "Show what quant would do, and refuse what it could not.",
    "practices": "List the recipes, and say which one a request gets.",
    "verify": "Check a quantized model, file by file and number by number.",
    "convert": "Convert a quantized model into another format, without loss.",
    "eval": "Measure a quantized model against its float model.",
    "demo": "Quantize a small real model and let it answer.",
    "plugins": "List the installed plugins and whether they work.",
    "schema": "Print the JSON Schema of the YAML protocol.",
}
"""Command, which is also its module in this package, and its line in --help. The module has ``command``."""


class LazyGroup(click.Group):
    """Imports a command when it is invoked, and none for --help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which people need them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"modelslim.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest command for a name that is none."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"no command is called {args[0]!r}", hint=nearest(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table above, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Quantize Hugging Face models, layer by layer, for an inference engine to load."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        args: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code, see :mod:`modelslim.cli.errors`.

    Raises:
        SystemExit: by click, with code 1 and silently, when nobody reads stdout any more.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    output = Output()
    try:
        with orderly_end():
            code = cli.main(arguments or ["--help"], standalone_mode=False, obj=output)
    except (Exception, KeyboardInterrupt) as error:
        if "--json" in arguments:  # a usage error may come before the option was read
            output.mode = "json"
        if wants_traceback(os.environ):
            import traceback

            traceback.print_exception(error)
        output.error(error)
        return exit_code(error)
    return code if isinstance(code, int) else DONE


if __name__ == "__main__":
    sys.exit(main())
