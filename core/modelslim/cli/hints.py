# SPDX-License-Identifier: Apache-2.0
"""What to write instead of a command line that is wrong: the nearest option, value or path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from modelslim.errors import closest

_ALSO_CALLED: Mapping[str, str] = {
    "--model": "--model_path",
    "--model_name": "--model_type",
    "--input": "--model_path",
    "--output": "--save_path",
    "--output_dir": "--save_path",
    "--out": "--save_path",
    "--config": "--config_path",
    "--gpu": "--device",
    "--bits": "--quant_type",
    "--quant_method": "--quant_type",
    "--force": "--yes",
    "-y": "--yes",
}
"""What other programs call an option, and its name here."""


class AdvisedParameter(click.BadParameter):
    """A value that is wrong, and what to write instead.

    Attributes:
        advice: the remedy; empty when there is none.
    """

    def __init__(self, message: str, ctx: click.Context | None, param: click.Parameter | None, advice: str) -> None:
        super().__init__(message, ctx, param)
        self.advice = advice


class ExistingPath(click.Path):
    """A file or a folder that must be there; offers what it finds near by when it is not.

    Args:
        folder: True for a folder, False for a file.
        advise: what to say of a path that is wrong.
    """

    def __init__(self, folder: bool, advise: Callable[[Path], str]) -> None:
        super().__init__(exists=True, file_okay=not folder, dir_okay=folder, path_type=Path)
        self.advise = advise

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, with advice."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            advice = ""
            with suppress(OSError, ValueError):  # of a name that no file can have, nothing is near
                advice = self.advise(Path(value))
            raise AdvisedParameter(error.message, error.ctx, error.param, advice) from error


def about_model(path: Path) -> str:
    """Advice on a ``--model_path`` that is no folder."""
    if path.suffix == ".gguf":
        return "GGUF holds weights that are quantized already: give the folder of the float model, with config.json"
    if path.is_file():
        return f"give the folder that holds it: {path.parent}"
    if near := _near(path):
        return near
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return "if this is a name on a hub: download the model first and give its folder"
    return "give the folder that holds config.json, the weights and the tokenizer"


def about_config(path: Path) -> str:
    """Advice on a ``--config_path`` that is no file."""
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.suffix in (".yaml", ".yml"))
        return f"give a file in it: {path / names[0]}" if names else "give a YAML file"
    if near := _near(path):
        return near
    if path.suffix not in (".yaml", ".yml"):
        return "of a practice, `modelslim practices show NAME` prints the protocol; --quant_type takes the best one"
    return "give a YAML file; without one, --quant_type takes a practice"


def about_folder(path: Path) -> str:
    """Advice on another folder."""
    return f"give the folder that holds it: {path.parent}" if path.is_file() else _near(path)


def advice(error: click.ClickException) -> str:
    """What to do about an error of the command line; empty when only its help can tell."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, AdvisedParameter):
        return error.advice
    if context is None:
        return ""
    if isinstance(error, click.NoSuchOption):
        return _about_option(error.option_name, context)
    if isinstance(error, click.BadOptionUsage):
        option = next((one for one in context.command.params if _is_called(one, error.option_name)), None)
        return _about_value(option) if option else ""
    if isinstance(error, click.MissingParameter):
        return _about_missing(error.param)
    if isinstance(error, click.BadParameter):
        return _about_value(error.param)
    wanted = [one.opts[0] for one in context.command.params if isinstance(one, click.Option) and one.required]
    if wanted:  # what else click finds is a word without an option
        return f"every value has its option in front, as in {' '.join(f'{name} PATH' for name in wanted)}"
    return ""


def single_hyphen(words: Iterable[str], command: click.Command) -> str:
    """The first word that would be an option of the command with one more hyphen; or empty."""
    known = {name.replace("_", "-") for one in command.params for name in one.opts}
    found = (word for word in words if len(word) > 2 and f"-{word.partition('=')[0]}".replace("_", "-") in known)
    return next(found, "")


def message(error: click.ClickException) -> str:
    """What is wrong; click adds what an option may have meant in both spellings, which the advice says better."""
    return error.message if isinstance(error, click.NoSuchOption) else error.format_message()


def _about_option(name: str, context: click.Context) -> str:
    command = context.command
    known = {known for one in command.params for known in (*one.opts, *one.secondary_opts) if known.startswith("-")}
    other = _ALSO_CALLED.get(name)
    if other in known:
        return f"did you mean '{other}'?"
    if isinstance(command, click.Group):
        return f"the command comes first, as in `{context.command_path} quant {name} ...`"
    if near := closest(name.replace("-", "_"), {one.replace("-", "_"): one for one in known}):
        return f"did you mean '{near}'?"
    arguments = [one.human_readable_name for one in command.params if isinstance(one, click.Argument)]
    return f"{arguments[0]} stands without an option: `{context.command_path} {arguments[0]}`" if arguments else ""


def _about_missing(parameter: click.Parameter | None) -> str:
    if not isinstance(parameter, click.Option):
        return ""
    return f"add {parameter.opts[0]} {_sample(parameter)}: {_first_sentence(parameter.help or '')}"


def _about_value(parameter: click.Parameter | None) -> str:
    if not isinstance(parameter, click.Option):
        return ""
    name, kind = parameter.opts[0], parameter.type
    if isinstance(kind, click.Choice):
        return "write " + " or ".join(f"{name} {choice}" for choice in kind.choices)
    if isinstance(kind, click.IntRange):
        return f"write a whole number of at least {kind.min}, as in {name} {kind.min}"
    return f"write {name} {_sample(parameter)}: {_first_sentence(parameter.help or '')}"


def _sample(option: click.Option) -> str:
    return "PATH" if isinstance(option.type, click.Path) else "VALUE"


def _first_sentence(text: str) -> str:
    first = re.split(r"\.(?:\s|$)|;", text, maxsplit=1)[0]
    return first[:1].lower() + first[1:]


def _is_called(parameter: click.Parameter, name: str) -> bool:
    return name.replace("-", "_") in {known.replace("-", "_") for known in parameter.opts}


def _near(path: Path) -> str:
    """``did you mean ...?`` for a path of which one part is misspelt; or empty."""
    for parent in path.parents:
        if parent.is_dir():
            rest = path.relative_to(parent).parts
            names = {one.name: one.name for one in parent.iterdir()}
            near = closest(rest[0], names) if rest else ""
            found = parent.joinpath(near, *rest[1:])
            return f"did you mean '{found}'?" if near and found.exists() else ""
    return ""
