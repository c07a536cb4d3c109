# SPDX-License-Identifier: Apache-2.0
"""transformers itself loads a checkpoint without its data, and says what of the tensors it cannot place."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelslim.api import EngineAnswer, PlannedModel, Problem

_NEEDED = {"compressed_tensors": "compressed-tensors", "accelerate": "accelerate"}
"""Package and distribution; without the latter transformers builds no model on meta."""

_CONVERSION = re.compile(r"^\s*(?P<why>\S[^\n]*)\n\s*Error: \w+ on tensors destined for (?P<name>\S+)\.", re.M)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_HINT = "it would stop, or fill in random numbers; quantize again with --engine transformers, or serve it with vLLM"


def ask_transformers(path: Path, model: PlannedModel, tensors: Mapping[str, Tensor]) -> EngineAnswer:
    """What transformers makes of the names, shapes and dtypes of a checkpoint.

    Args:
        path: the directory, for config.json.
        model: the model as it was read from the checkpoint.
        tensors: every tensor on meta, by name.
    """
    absent = [name for package, name in _NEEDED.items() if find_spec(package) is None]
    if absent:
        return EngineAnswer(reason=f"{' and '.join(absent)} cannot be imported")
    import transformers

    versions = [f"{name} {version(name)}" for name in ("transformers", "compressed-tensors")]
    asked = " with ".join(versions)
    with _quietly() as said:
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            kind = getattr(transformers, (config.architectures or ["?"])[0], None)
            if kind is None:
                return EngineAnswer(reason=f"{versions[0]} has no class {config.architectures} of its own")
            # Random numbers for what is missing would fail for integers, without a name.
            kind = type(kind.__name__, (kind,), {"initialize_weights": lambda self: None})
            built, _ = _load(kind, config, {})
            _, report = _load(kind, config, {**tensors, **_shapes(model, tensors)})
        except Exception as error:  # whatever it is, the user would meet it too
            return EngineAnswer(asked, [*_conversions(asked, said)] or [_refusal(asked, error)])
    return EngineAnswer(asked, [*_differences(asked, report), *_dtypes(asked, built, tensors)])


def _load(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model on meta, and what transformers reports of these tensors."""
    loaded: tuple[torch.nn.Module, Mapping[str, Any]] = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return loaded


def _shapes(model: PlannedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weight_shape`` of every linear that has one: the only values by which the package goes when it unpacks."""
    shapes = {f"{one.stored}.weight_shape": (one.out_features, one.in_features) for one in model.linears.values()}
    return {name: torch.tensor(shape) for name, shape in shapes.items() if name in tensors}


def _differences(asked: str, report: Mapping[str, Any]) -> Iterator[Problem]:
    for name in sorted(report["missing_keys"]):
        yield Problem(f"{asked} wants {name}, and nothing in the checkpoint makes it", _HINT)
    for name in sorted(report["unexpected_keys"]):
        yield Problem(f"{asked} has no place for {name} and would pass over it", _HINT)
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        yield Problem(f"{asked} wants {name} in the shape {list(wanted)}, and it is {list(stored)}", _HINT)
    for message in report["error_msgs"]:
        yield Problem(f"{asked}: {message}", _HINT)


def _dtypes(asked: str, built: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Numbers of another kind than the parameter's; of floats one becomes the other."""
    for name, wanted in (*built.named_parameters(), *built.named_buffers()):
        stored = tensors.get(name)
        if stored is not None and _kind(stored.dtype) != _kind(wanted.dtype):
            dtypes = [str(one.dtype).removeprefix("torch.") for one in (wanted, stored)]
            yield Problem(f"{asked} wants {name} in {dtypes[0]}, and it is {dtypes[1]}", _HINT)


def _kind(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype not in _FLOAT8 else dtype


def _conversions(asked: str, said: list[str]) -> Iterator[Problem]:
    """What transformers writes of weights that it could not put together; the exception does not say it."""
    for match in _CONVERSION.finditer("\n".join(said)):
        yield Problem(f"{asked} cannot make {match['name']}: {match['why'].strip()}", _HINT)


def _refusal(asked: str, error: Exception) -> Problem:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Problem(f"{asked} refuses the checkpoint: {first}", _HINT)


@contextmanager
def _quietly() -> Iterator[list[str]]:
    """Keeps reports and progress bars off the terminal, and collects the former."""
    from loguru import logger

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("transformers")
    handlers, level = log.handlers[:], log.level
    log.handlers[:] = [handler]
    log.setLevel(logging.WARNING)
    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield said
    finally:
        logger.enable("compressed_tensors")
        log.handlers[:] = handlers
        log.setLevel(level)
