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


@dataclass(frozen=True)
class Found:
    """The protocol of a run.

    Attributes:
        protocol: the YAML file.
        engine: the engine that is checked; None for that of the format.
        practice: how the protocol was chosen; None when the user named it.
        remarks: what the user should know.
    """

    protocol: Path
    engine: str | None
    practice: Choice | None = None
    remarks: Sequence[str] = ()


def find_protocol(asked: Asked) -> Found:
    """The protocol that the options mean; nothing is told yet, and nobody asked.

    Raises:
        UsageError: the options exclude each other, or there is no practice.
        ModelError, PluginError: as of :func:`look_up`.
    """
    if asked.config_path is not None:
        if asked.quant_type is not None:
            raise UsageError(
                "--config_path and --quant_type exclude each other: the one names a protocol, the other looks one up",
                hint="leave one of them out; `modelslim practices show NAME` prints a practice to start from",
            )
        ignored = ["--tag has no effect beside --config_path; --engine checks what an engine loads"]
        return Found(asked.config_path, asked.engine, remarks=ignored if asked.tags else ())
    from modelslim.practice_choice import choose

    request, verdicts, remarks = look_up(asked)
    choice = choose(request, verdicts)
    return Found(choice.practice.file, request.engine or None, choice, remarks)


def look_up(asked: Asked) -> tuple[Request, list[Verdict], list[str]]:
    """The request, what speaks for or against each practice, and what the user should know.

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
    verified = sorted({name for one in practices for name in one.verified})
    model = find_model(config, asked.model_type, registry, verified)
    tags = read_tags(asked.tags, registry, used_tags(practices))
    broken = [f"{one.file} is no practice: {one.problem}" for one in practices if one.problem]
    request = Request(model, quant_type, tags, asked.engine or tags.engine)
    return request, judge(request, practices, registry), [*tags.remarks, *broken]


def settle(output: Output, choice: Choice, yes: bool, remarks: Sequence[str] = ()) -> None:
    """Tell which practice was chosen and why; where that needs it, have the user agree.

    Args:
        output: where to tell it.
        choice: the practice.
        yes: the user has agreed.
        remarks: what else the user should know.

    Raises:
        UsageError: the user did not agree, or could not be asked.
        click.Abort: the user broke off.
    """
    remark = choice.request.model.remark
    if choice.needs_consent and not yes and not _can_ask():
        raise UsageError(
            f"this needs a confirmation, and there is no terminal to ask on; it would be: {choice.line}",
            hint="; ".join(filter(None, ["--yes takes it", remark, *remarks, _REMEDY])),
        )
    for other in remarks:
        output.warn(other)
    if not choice.needs_consent:
        output.note(choice.line)
        return
    if remark:
        output.warn(remark)
    output.warn(f"{choice.line}; taken because of --yes" if yes else choice.line)
    if not yes and not click.confirm("Take this practice?", default=False, err=True):
        raise UsageError("the practice was not taken", hint=_REMEDY)


def is_told(warning: str, choice: Choice | None) -> bool:
    """True for a warning of the plan that :func:`settle` has told already."""
    return choice is not None and choice.needs_consent and choice.request.model.remark.startswith(warning)


_REMEDY = "`modelslim practices why` shows what else there is; --config_path names a protocol of yours"


def _can_ask() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
