# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share. Every one is accepted in the guide's spelling and in kebab-case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from modelslim.cli.output import Mode, Output

F = TypeVar("F", bound=Callable[..., Any])


class _TwoSpellings(click.Option):
    """An option that also answers to its name with hyphens; help and messages show the declared name."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        declared = self.opts
        hyphened = (f"--{name[2:].replace('_', '-')}" for name in declared if name.startswith("--"))
        self.opts = list(dict.fromkeys([*declared, *hyphened]))
        super().add_to_parser(parser, ctx)
        self.opts = declared


def option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """``click.option`` for a name with underscores that is accepted with hyphens, too."""
    return click.option(*names, cls=_TwoSpellings, **attributes)


def _set_mode(mode: Mode) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        output = context.ensure_object(Output)
        if value and output.mode != "json":  # --json decides when both are given
            output.mode = mode

    return callback


def _to_bool(context: click.Context, parameter: click.Parameter, value: str) -> bool:
    return value == "True"


model_path_option = option(
    "--model_path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of the Hugging Face checkpoint.",
)

save_path_option = option(
    "--save_path",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the result; made when missing.",
)

device_option = option(
    "--device", default=None, help="cpu, cuda, cuda:1, npu or npu:1.  [default: the best that is there]"
)

devices_option = option(
    "--device",
    default=None,
    help="cpu, cuda:1, or several that share the work, as in npu:0,1,2,3.  [default: the best that is there]",
)

workers_option = option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="How many processes share the work on the CPU.  [default: 1]",
)

max_memory_option = option(
    "--max_memory",
    default=None,
    help="What the run may hold beyond the program itself: 24GiB, and of accelerators 24GiB,cuda:0=60GiB.  [default: "
    "no limit, and what is free on an accelerator]",
)

model_type_option = option(
    "--model_type",
    default=None,
    help="Name of the model, such as Qwen2.5-7B-Instruct.  [default: what config.json says]",
)

config_path_option = option(
    "--config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="YAML protocol that says what becomes of the model.",
)

engine_option = option(
    "--engine",
    default=None,
    help="Refuse what this engine cannot load: vllm-ascend, vllm, transformers, or one version, as in "
    "vllm-ascend-0.23.  [default: warn, for the engine that the format is made for]",
)

tp_option = option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Degree of tensor parallelism at which the engine will run.",
)

trust_remote_code_option = option(
    "--trust_remote_code",
    type=click.Choice(["True", "False"], case_sensitive=False),
    default="False",
    show_default=True,
    callback=_to_bool,
    help="Run Python code that lies in the checkpoint.",
)

verify_option = option(
    "--verify/--no-verify",
    "check",
    default=True,
    help="Check the result before it gets its name.  [default: verify]",
)

restart_option = option(
    "--restart",
    is_flag=True,
    help="Begin anew what an interrupted run left in <save_path>.partial.  [default: continue it]",
)

json_option = option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_mode("json"),
    help="Write the result, or the error, as one JSON document to stdout.",
)

quiet_option = option(
    "--quiet",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_mode("quiet"),
    help="Say nothing but warnings and errors.",
)
