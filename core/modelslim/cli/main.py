# SPDX-License-Identifier: Apache-2.0
"""The program ``modelslim``: finds the command, imports it, turns errors into words and exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from modelslim import __version__
from modelslim.cli.errors import DONE, exit_code
from modelslim.cli.hints import single_hyphen
from modelslim.cli.logs import log_level, messages_of_others
from modelslim.cli.output import Output
from modelslim.cli.signals import orderly_end
from modelslim.errors import UsageError, nearest
from modelslim.start import started, starting

COMMANDS: Mapping[str, str] = {
    "quant": "Quantize a model and write the result.",
    "plan": "Show what quant would do, and refuse what it could not.",
    "practices": "List the recipes, and say which one a request gets.",
    "verify": "Check a quantized model, file by file and number by number.",
    "convert": "Convert a quantized model into another format, without loss.",
    "analyze": "Find out what of a model suffers most from quantization.",
    "tune": "Search for a protocol, and quantize with it.",
    "inspect": "Show scales, ranges and decisions that quant --debug kept.",
    "report": "Make report.html anew from report.json.",
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
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and (word := single_hyphen(rest, command)):
            raise UsageError(f"no option is called {word!r}", hint=f"did you mean '-{word}'?")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; an error in the use of an option learns whose option it is."""
        try:
            return super().invoke(ctx)
        except click.BadOptionUsage as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if error.ctx is None and command is not None:
                error.ctx = click.Context(command, parent=ctx, info_name=ctx.invoked_subcommand)
            raise

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
    output.command = ("modelslim", *arguments)
    starting()
    try:
        output.level = log_level(os.environ)
        with messages_of_others(output), orderly_end():
            code = cli.main(arguments or ["--help"], standalone_mode=False, obj=output)
    except (Exception, KeyboardInterrupt) as error:
        if "--json" in arguments:  # a usage error may come before the option was read
            output.mode = "json"
        if output.level <= logging.DEBUG:
            import traceback

            output.debug("".join(traceback.format_exception(error)).rstrip())
        output.error(error)
        return exit_code(error)
    finally:
        started()
    return code if isinstance(code, int) else DONE


if __name__ == "__main__":
    sys.exit(main())
