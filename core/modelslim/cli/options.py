# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share. Every one is accepted in the guide's spelling and in kebab-case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from modelslim.cli.hints import ExistingPath, about_config, about_model
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


class TagCommand(click.Command):
    """A command whose ``--tag`` takes all words up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with ``--tag`` in front of each of its words."""
        return super().parse_args(ctx, list(_with_tags_apart(args)))


def _with_tags_apart(args: Sequence[str]) -> Iterator[str]:
    takes = False
    for position, word in enumerate(args):
        is_option = word.startswith("-")
        is_value_of_tag = position > 0 and args[position - 1] == "--tag"
        if takes and not is_option and not is_value_of_tag:
            yield "--tag"
        takes = word.partition("=")[0] == "--tag" or (takes and not is_option)
        yield word


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
    type=ExistingPath(folder=True, advise=about_model),
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
    type=ExistingPath(folder=False, advise=about_config),
    default=None,
    help="YAML protocol that says what becomes of the model.  [default: a practice, see --quant_type]",
)

quant_type_option = option(
    "--quant_type",
    default=None,
    help="Take the best known practice of this type, such as w8a8, w8a16, w4a16, w4a8 or w8a8c8; excludes "
    "--config_path.  [default: w8a8]",
)

tag_option = option(
    "--tag",
    "tags",
    multiple=True,
    help="Scenario in which the result will run, as in --tag vLLM-Ascend Atlas_A2_Inference: an engine, whose "
    "contract is then checked as by --engine, and hardware.",
)

practices_option = option(
    "--practices",
    "practice_folders",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder with practices of yours, beside those of MSMODELSLIM_CUSTOM_PRACTICE_REPO.",
)

yes_option = option("--yes", is_flag=True, help="Take a practice that is not verified for the model without asking.")

calib_samples_option = option(
    "--calib_samples",
    type=click.IntRange(min=1),
    default=None,
    help="Calibrate on at most so many samples, evenly spread over the set.  [default: as many as are wanted]",
)

calib_length_option = option(
    "--calib_length",
    type=click.IntRange(min=1),
    default=None,
    help="Cut texts of the calibration set after so many tokens.  [default: never]",
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
    help="Write the result, or the error, as one JSON document to stdout, and events as lines of JSON to stderr.",
)

quiet_option = option(
    "--quiet",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_mode("quiet"),
    help="Say nothing but warnings and errors.",
)
