# SPDX-License-Identifier: Apache-2.0
"""config.json without what it says of quantization, so that an adapter opens a quantized checkpoint as any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelslim.checkpoint import Checkpoint, StoredTensor
from modelslim.disk import write_json
from modelslim.saver import SavedLinear

_KEY = "quantization_config"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without ``quantization_config``, also in the configurations of parts (``text_config``, ...)."""
    return {
        key: without_quantization(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key != _KEY
    }


@contextmanager
def opened_as_float(checkpoint: Checkpoint) -> Iterator[Path]:
    """A directory that holds what a quantized checkpoint holds, and a config.json that says nothing of it.

    It is the checkpoint's own where its config.json says nothing, and else lasts as long as the context; the files
    in it are links.
    """
    config = without_quantization(checkpoint.config)
    if config == checkpoint.config:
        yield checkpoint.path
        return
    with TemporaryDirectory(prefix="modelslim-") as name:
        directory = Path(name)
        for entry in checkpoint.path.iterdir():
            if entry.name != "config.json":
                (directory / entry.name).symlink_to(entry.resolve())
        write_json(directory / "config.json", config)
        yield directory


def named_as_float(tensors: Mapping[str, StoredTensor], saved: Mapping[str, SavedLinear]) -> dict[str, StoredTensor]:
    """The tensors of a result by the names that its float weights would have, by which adapters know them."""
    held = {name for linear in saved.values() for name in linear.tensors}
    floats = {name: stored for name, stored in tensors.items() if name not in held}
    for name, linear in saved.items():
        codes = max((tensors[one] for one in linear.tensors), key=lambda one: one.nbytes)
        floats[f"{name}.weight"] = replace(codes, name=f"{name}.weight", dtype="BF16")
        if f"{name}.bias" in held:
            floats[f"{name}.bias"] = tensors[f"{name}.bias"]
    return floats
