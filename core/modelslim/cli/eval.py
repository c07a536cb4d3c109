# SPDX-License-Identifier: Apache-2.0
"""``modelslim eval``: perplexity and KL of a saved checkpoint against its float model."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import click

from modelslim.cli.hints import ExistingPath, about_folder
from modelslim.cli.options import device_option, json_option, option, trust_remote_code_option
from modelslim.cli.output import Output, pass_output
from modelslim.errors import DatasetError


@click.command()
@click.argument("path", type=ExistingPath(folder=True, advise=about_folder))
@option(
    "--float",
    "float_path",
    type=ExistingPath(folder=True, advise=about_folder),
    required=True,
    help="Folder of the float model that PATH was made from.",
)
@option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Text that both models read, UTF-8.  [default: an English text that comes with modelslim]",
)
@option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@option("--max_tokens", type=click.IntRange(min=2), default=None, help="Read so many tokens.  [default: all]")
@option(
    "--dtype",
    type=click.Choice(["float32", "model"]),
    default="float32",
    show_default=True,
    help="Type of the floating arithmetic: float32 shows quantization alone, model what an engine computes in.",
)
@device_option
@trust_remote_code_option
@json_option
@pass_output
def command(
    output: Output,
    path: Path,
    float_path: Path,
    text: Path | None,
    window: int,
    max_tokens: int | None,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Measure a quantized model against its float model.

    PATH is the folder that quant wrote. What runs are the tensors of that folder, decoded as an
    engine decodes them.
    """
    from modelslim.devices import prepare_threads

    prepare_threads()
    from modelslim.evaluation import evaluate

    start = time.monotonic()
    result = evaluate(
        path,
        float_path,
        _read(text),
        window=window,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    rows = [
        ("perplexity, float", f"{result.float_perplexity:.3f}"),
        ("perplexity, quantized", f"{result.quantized_perplexity:.3f}"),
        ("mean KL(float || quantized)", f"{result.kl:.5f}"),
        ("same next token", f"{result.top1_agreement:.1%}"),
        ("tokens", f"{result.tokens}"),
    ]
    output.table(f"Evaluated in {time.monotonic() - start:.1f} s", ["", ""], rows)
    output.data(asdict(result))


def _read(text: Path | None) -> str:
    if text is None:
        return files("modelslim.calibration").joinpath("eval_english.txt").read_text(encoding="utf-8")
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{text}: not UTF-8 at byte {error.start}", hint="save the file as UTF-8") from error
