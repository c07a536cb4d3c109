# SPDX-License-Identifier: Apache-2.0
"""``modelslim verify``: whether a quantized checkpoint is sound, and whether an engine loads it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelslim.cli.hints import ExistingPath, about_folder
from modelslim.cli.options import engine_option, json_option, option, tp_option, trust_remote_code_option
from modelslim.cli.output import Output, pass_output
from modelslim.errors import Diagnostic, VerificationError

if TYPE_CHECKING:
    from modelslim.verify_numbers import LinearError


@click.command()
@click.argument("path", type=ExistingPath(folder=True, advise=about_folder))
@option(
    "--float",
    "float_path",
    type=ExistingPath(folder=True, advise=about_folder),
    default=None,
    help="Folder of the float model that PATH was made from: compare every tensor and every weight with it.",
)
@engine_option
@tp_option
@trust_remote_code_option
@json_option
@pass_output
def command(
    output: Output, path: Path, float_path: Path | None, engine: str | None, tp: int, trust_remote_code: bool
) -> None:
    """Check a quantized model, file by file and number by number.

    PATH is the folder of a quantized model, of any installed format. Nothing is run: weight files,
    index and description are compared with each other and with config.json, and all numbers are read.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.verify import verify

    start = time.monotonic()
    found = verify(path, float_path, engine=engine, tp=tp, trust_remote_code=trust_remote_code)
    for problem in found.problems:
        if not problem.fatal:
            output.warn(str(Diagnostic(problem.message, hint=problem.hint)))
    if worst := _worst(found.errors):
        output.table("", ["weights farthest from the float ones", "relative error", "of rounding", ""], worst)
    faults = found.faults
    floats = found.float_linears
    more = f", such as {floats[0]}" if floats else ""
    rows = [
        ("format", found.format or "not known"),
        ("schemes", ", ".join(f"{count} linears {scheme}" for scheme, count in found.schemes.items())),
        ("float", f"{len(floats)} linear{'' if len(floats) == 1 else 's'}{more}"),
        ("engine", found.engine or "none"),
        *([("asked", found.asked)] if found.asked else []),
        *([("by contract only", found.by_contract)] if found.by_contract else []),
        ("faults", str(len(faults)) if faults else "none"),
    ]
    output.table(f"Verified in {time.monotonic() - start:.1f} s", ["", ""], rows)
    output.data(found.as_data())
    if faults:
        raise VerificationError(
            f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}",
            diagnostics=[Diagnostic(problem.message, hint=problem.hint) for problem in faults],
        )


def _worst(errors: Mapping[str, LinearError], count: int = 10) -> Sequence[tuple[str, ...]]:
    """Rows of the weights that are farthest from the float ones, the farthest first."""
    found = sorted(errors.items(), key=lambda one: -one[1].relative)[:count]
    return [
        (name, f"{error.relative:.4f}", f"{error.expected:.4f}", "smoothed" if error.rescaled else "")
        for name, error in found
    ]
