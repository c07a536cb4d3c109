# SPDX-License-Identifier: Apache-2.0
"""``modelslim practices``: which recipes there are, and which of them a request gets."""

from __future__ import annotations

from pathlib import Path

import click

from modelslim.cli.choosing import Asked, look_up
from modelslim.cli.hints import ExistingPath, about_model
from modelslim.cli.options import (
    TagCommand,
    engine_option,
    json_option,
    model_type_option,
    option,
    practices_option,
    quant_type_option,
    tag_option,
)
from modelslim.cli.output import Output, pass_output


@click.group(invoke_without_command=True)
@practices_option
@json_option
@click.pass_context
def command(context: click.Context, practice_folders: tuple[Path, ...]) -> None:
    """List the recipes, and say which one a request gets.

    Practices ship with adapters, or lie in folders of yours. Without a command they are listed.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_all, practice_folders=practice_folders)
    elif practice_folders:
        raise click.UsageError(f"write --practices behind {context.invoked_subcommand}", context)


@command.command("list")
@practices_option
@json_option
@pass_output
def list_all(output: Output, practice_folders: tuple[Path, ...]) -> None:
    """List all practices, those that cannot be used too."""
    from modelslim.practices import find_practices
    from modelslim.registry import Registry

    practices = find_practices(Registry.scan(), practice_folders)
    output.table(
        f"{len(practices)} practices",
        ["name", "type", "evidence", "for", "writes", "from", "problem"],
        [
            (
                one.config_id,
                one.quant_type or "",
                one.evidence,
                ", ".join(one.model_types or one.verified),
                one.saver,
                one.origin,
                one.problem,
            )
            for one in practices
        ],
    )
    output.data({"practices": [one.as_data() for one in practices]})


@command.command("show")
@click.argument("name")
@practices_option
@json_option
@pass_output
def show(output: Output, name: str, practice_folders: tuple[Path, ...]) -> None:
    """Print the YAML of a practice; what it claims goes to stderr."""
    from modelslim.practices import find_practice, find_practices
    from modelslim.registry import Registry

    practice = find_practice(name, find_practices(Registry.scan(), practice_folders))
    text = practice.file.read_text(encoding="utf-8-sig")
    if output.mode == "json":
        output.data({**practice.as_data(), "yaml": text})
        return
    verified = f"verified for {', '.join(practice.verified)}" if practice.verified else "not verified for any model"
    output.note(f"{practice.file}, {practice.evidence}, {verified}")
    if practice.problem:
        output.warn(practice.problem)
    click.echo(text, nl=not text.endswith("\n"))


@command.command("why", cls=TagCommand)
@option(
    "--model_path",
    type=ExistingPath(folder=True, advise=about_model),
    default=None,
    help="Folder of the Hugging Face checkpoint.  [default: only the name counts]",
)
@model_type_option
@quant_type_option
@tag_option
@engine_option
@practices_option
@json_option
@pass_output
def why(
    output: Output,
    model_path: Path | None,
    model_type: str | None,
    quant_type: str | None,
    tags: tuple[str, ...],
    engine: str | None,
    practice_folders: tuple[Path, ...],
) -> None:
    """Say which practice a request gets, by which priority, and what speaks against the others."""
    from modelslim.errors import UsageError
    from modelslim.practice_choice import choose, describe, fits, is_foreign, priorities
    from modelslim.quant_type import RECOMMENDED

    asked = Asked(None, quant_type, tags, practice_folders, model_path, model_type, engine)
    request, verdicts, remarks = look_up(asked)
    for remark in (*remarks, request.model.remark):
        if remark:
            output.warn(remark)
    wanted = request.quant_type or RECOMMENDED
    levels = [
        (
            number,
            describe(request, one, standing),
            [found.practice.config_id for found in fits(verdicts, one, standing)],
        )
        for number, one, standing in priorities(wanted)
    ]
    choice = None
    try:
        choice = choose(request, verdicts)
        line = f"{choice.line}{'; needs a confirmation' if choice.needs_consent else ''}"
    except UsageError as error:
        line = f"{error.message} ({error.hint})"
    output.table(
        "",
        ["priority", "looks for", "found, the first is taken"],
        [(number, looks_for, ", ".join(found) or "-") for number, looks_for, found in levels],
    )
    near = [
        (one.practice.config_id, one.practice.quant_type, one.why)
        for one in verdicts
        if one.practice.quant_type in (wanted, RECOMMENDED) and not is_foreign(one.practice, request.model)
    ]
    output.table("", ["practice", "type", "it"], near)
    output.table("", [""], [(f"{wanted}: {wanted.lacking}",), (line,)] if wanted.lacking else [(line,)])
    output.data(
        {
            "model": list(request.model.names),
            "quant_type": str(wanted),
            "lacking": wanted.lacking,
            "tags": list(request.tags.given),
            "engine": request.engine or None,
            "priorities": [
                {"priority": number, "looks_for": looks_for, "found": found} for number, looks_for, found in levels
            ],
            "practices": [
                {"config_id": one.practice.config_id, "standing": one.standing, "why": one.why} for one in verdicts
            ],
            "chosen": choice.as_data() if choice else None,
            "needs_consent": choice.needs_consent if choice else None,
            "line": line,
        }
    )
