# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights: tokenizer, processor, chat template, code, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from modelslim.disk import save_error
from modelslim.output_directory import DEBUG_INFO

# The weights in any layout, and indices that would send an engine to them.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz")
# A .pt file may also hold what no other file does, such as the voices of a model that speaks.
_WEIGHTS_PT = ("model", "weights", "consolidated", "checkpoint")
_INDEX = ".index.json"
_DESCRIPTION = "quant_model_description"
# What an earlier run says of its result, where the source is one.
_OF_A_RUN = ("report.html", DEBUG_INFO)


def companions(source: Path) -> Iterator[Path]:
    """Files of a checkpoint that the result needs too, relative to its directory; config.json is left out."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if any(part.startswith(".") or part == "__pycache__" for part in relative.parts) or not file.is_file():
            continue
        if _holds_weights(file) or file.name.endswith(_INDEX) or file.name.startswith(_DESCRIPTION):
            continue
        if relative != Path("config.json") and relative.parts[0] not in _OF_A_RUN:
            yield relative


def _holds_weights(file: Path) -> bool:
    return file.suffix in _WEIGHTS or (file.suffix == ".pt" and any(word in file.stem for word in _WEIGHTS_PT))


def copy_companions(source: Path, target: Path) -> None:
    """Copy them; links are followed, since a model in a cache consists of links.

    Raises:
        SaveError: a file cannot be copied.
    """
    relative = Path()
    try:
        for relative in companions(source):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target / relative)
    except OSError as error:
        raise save_error(target / relative, error) from error
