# SPDX-License-Identifier: Apache-2.0
"""The protocol of ``quant`` and ``plan``: the file that the user names, or a practice and the user's consent to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelslim.cli.output import Output
from modelslim.errors import UsageError

if TYPE_CHECKING:
    from modelslim.practice_choice import Choice, Request, Verdict


@dataclass(frozen=True)
class Asked:
    """What the options say of the protocol.

    Attributes:
        config_path: the protocol; None for a practice.
        quant_type: the type as given; None when it was not.
        tags: the words of ``--tag``.
        folders: further folders of practices.
        model_path: the model; None when only its name is known.
        model_type: the name as given; None when it was not.
        engine: as given; None when it was not.
    """

    config_path: Path | None
    quant_type: str | None
    tags: Sequence[str]
    folders: Sequence[Path]
    model_path: Path | None
    model_type: str | None
    engine: str | None


def find_protocol(output: Output, asked: Asked) -> tuple[Path, str | None, Choice | None]:
    """The protocol, the engine that is checked, and the choice where it is a practice; the choice is not yet told.

    Raises:
        UsageError: the options exclude each other, or there is no practice.
    """
    if asked.config_path is not None:
        if asked.quant_type is not None:
            raise UsageError(
                "--config_path and --quant_type exclude each other: the one names a protocol, the other looks one up",
                hint="leave one of them out; `modelslim practices show NAME` prints a practice to start from",
            )
        if asked.tags:
            output.warn("--tag has no effect beside --config_path; --engine checks what an engine loads")
        return asked.config_path, asked.engine, None
    from modelslim.practice_choice import choose

    request, verdicts = look_up(output, asked)
    choice = choose(request, verdicts)
    return choice.practice.file, request.engine or None, choice


def look_up(output: Output, asked: Asked) -> tuple[Request, list[Verdict]]:
    """The request, and what speaks for or against each practice; tells what the user should know of the tags.

    Raises:
        UsageError: an option means nothing.
        ModelError, PluginError: the model or its adapter cannot be used.
    """
    from modelslim.checkpoint import read_json
    from modelslim.practice_choice import Request, find_model, judge, used_tags
    from modelslim.practices import find_practices
    from modelslim.quant_type import parse_quant_type
    from modelslim.registry import Registry
    from modelslim.tags import read_tags

    quant_type = None if asked.quant_type is None else parse_quant_type(asked.quant_type)
    registry = Registry.scan()
    practices = find_practices(registry, asked.folders)
    config = None if asked.model_path is None else read_json(asked.model_path / "config.json")
    model = find_model(config, asked.model_type, registry)
    tags = read_tags(asked.tags, registry, used_tags(practices))
    for remark in tags.remarks:
        output.warn(remark)
    for practice in practices:
        if practice.problem:
            output.warn(f"{practice.file} is no practice: {practice.problem}")
    request = Request(model, quant_type, tags, asked.engine or tags.engine)
    return request, judge(request, practices, registry)


def settle(output: Output, choice: Choice, yes: bool) -> None:
    """Tell which practice was chosen and why; where that needs it, have the user agree.

    Raises:
        UsageError: the user did not agree, or could not be asked.
        click.Abort: the user broke off.
    """
    if not choice.needs_consent:
        output.note(choice.line)
    elif yes:
        output.warn(f"{choice.line}; taken because of --yes")
    elif _can_ask():
        output.warn(choice.line)
        if not click.confirm("Take this practice?", default=False, err=True):
            raise UsageError("the practice was not taken", hint=_REMEDY)
    else:
        raise UsageError(
            f"this needs a confirmation, and there is no terminal to ask on; it would be: {choice.line}",
            hint=f"--yes takes it; {_REMEDY}",
        )


_REMEDY = "`modelslim practices why` shows what else there is; --config_path names a protocol of yours"


def _can_ask() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
