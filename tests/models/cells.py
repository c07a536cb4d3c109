# SPDX-License-Identifier: Apache-2.0
"""A cell of the table: one family in one scheme, quantized, checked, loaded and run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accounts import dequantized, find_unaccounted, linears_of
from ascend_output import Linear, Output, Stored, read_output, read_tensors
from ascend_rules import find_problems, find_unsupported
from checkpoints import write_family, write_samples
from families import FAMILIES
from safetensors.torch import save_file
from schemes import write_protocol
from torch import Tensor

from modelslim.adapters import choose_adapter, open_session
from modelslim.checkpoint import Checkpoint
from modelslim.dataset import read_samples
from modelslim.errors import ModelSlimError
from modelslim.open_model import OpenModel
from modelslim.registry import Registry
from modelslim.run import quantize
from modelslim.saved import load_model
from modelslim.vlm_dataset import read_vlm_samples

BOUNDS: Mapping[str, float] = {"W8A8": 0.25, "W8A8_DYNAMIC": 0.25, "W8A16": 0.25, "W4A8_DYNAMIC": 0.7, "W4A16": 0.7}
"""Relative error of the logits that a random model of two layers may show.

Its weights are as large in all directions, and its routers nearly undecided, so that rounding shows
more than in a trained model. That the weights are right is checked without slack elsewhere.
"""
ROUNDED = {"W8A8": 0.25, "W8A8_DYNAMIC": 0.25, "W8A16": 0.02, "W4A8_DYNAMIC": 0.25, "W4A16": 0.02}
"""The same against transformers with the stored weights: what is left is the rounding of the activations."""


@dataclass(frozen=True)
class Cell:
    """What came of a cell.

    Attributes:
        refusal: why the plan or the run refused it; empty when it ran.
        warnings: of the run.
        problems: what is wrong with the result; empty when nothing is.
    """

    refusal: str = ""
    warnings: Sequence[str] = ()
    problems: Sequence[str] = field(default_factory=list)


class FamilyRun:
    """A tiny float checkpoint of a family, which all its cells share.

    Args:
        name: the family.
        path: a directory of its own.
        samples: where the calibration data is.
    """

    def __init__(self, name: str, path: Path, samples: Path) -> None:
        self.name = name
        self.family = FAMILIES[name]
        path.mkdir()
        self._path = path
        self.samples = samples
        self._cells: dict[str, Cell] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """Directory of the float checkpoint."""
        path = self._path / "float"
        path.mkdir()
        write_family(self.name, path)
        return path

    @cached_property
    def source(self) -> dict[str, Stored]:
        """Its tensors."""
        return {name: one for file in self.checkpoint.glob("*.safetensors") for name, one in read_tensors(file).items()}

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Its matrices."""
        return linears_of(self.source, self.name)

    @cached_property
    def adapter(self) -> str:
        """Name of the adapter that serves it."""
        with Checkpoint(self.checkpoint) as checkpoint:
            return choose_adapter(checkpoint.config, None, Registry.scan())[1]

    @cached_property
    def _opened(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Tensor]]:
        """Model inputs of the samples, and the logits that unit-wise forwards give for them."""
        registry = Registry.scan()
        with Checkpoint(self.checkpoint) as checkpoint, torch.no_grad():
            model_type = checkpoint.config["model_type"]
            session = open_session("adapters", self.adapter, model_type, self.checkpoint, False, registry)
            opened = OpenModel.opened_by(session, checkpoint)
            inputs = session.handle_dataset(self._read_samples(), "cpu")
            return inputs, opened.run_units(inputs)

    @property
    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """Model inputs of the samples."""
        return self._opened[0]

    @property
    def unit_wise(self) -> Sequence[Tensor]:
        """Logits of the samples, computed unit by unit."""
        return self._opened[1]

    @cached_property
    def whole(self) -> Sequence[Tensor]:
        """Logits of the samples as transformers itself loads and runs the model."""
        return self._run(self._load(self.checkpoint))

    def cell(self, scheme: str) -> Cell:
        """What comes of quantizing it to a scheme; done once."""
        if scheme not in self._cells:
            self._cells[scheme] = self._quantize(scheme)
        return self._cells[scheme]

    def _read_samples(self) -> Sequence[Any]:
        path = self.samples / self.family.samples
        return read_vlm_samples(path, "describe")[0] if path.is_dir() else read_samples(path)

    def _quantize(self, scheme: str) -> Cell:
        protocol, result = self._path / f"{scheme}.yaml", self._path / scheme
        write_protocol(protocol, self.family, scheme, self.samples)
        try:
            report = quantize(self.checkpoint, result, protocol, device="cpu")
        except ModelSlimError as error:
            first = error.diagnostics[0] if error.diagnostics else error
            return Cell(
                f"{first.message} ({first.hint})" if first.hint else first.message,
                problems=[f"{result.name} is there"] if result.exists() else [],
            )
        output = read_output(result)
        problems = [
            *find_unaccounted(output, self.source, self.linears),
            *find_problems(output, self.linears),
            *self._unwarned(output, report["warnings"]),
        ]
        if not problems:  # else loading would say the same once more, and less clearly
            problems += self._run_result(result, output, scheme)
        shutil.rmtree(result)
        return Cell(warnings=report["warnings"], problems=problems)

    def _unwarned(self, output: Output, warnings: Sequence[str]) -> Iterator[str]:
        """Linears that the engine will not load although nobody said so."""
        strange = next(find_unsupported(output, self.linears), None)
        if strange is not None and not any("vLLM-Ascend runs" in warning for warning in warnings):
            yield f"{strange}: the engine has no such linear, and no warning says so"

    def _run_result(self, result: Path, output: Output, scheme: str) -> Iterator[str]:
        logits = self._run(load_model(result, self.checkpoint, device="cpu"))
        error = _difference(logits, self.whole)
        if not error < BOUNDS[scheme]:
            yield f"its logits differ from the float model's by {error:.3f}"
        decoded = self._path / "decoded"
        shutil.copytree(self.checkpoint, decoded, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
        weights = {
            name: torch.from_numpy(np.array(data)).to(_TORCH[self.source[name].dtype])
            for name, data in dequantized(output, self.source, self.name).items()
        }
        save_file(weights, decoded / "model.safetensors", metadata={"format": "pt"})
        error = _difference(logits, self._run(self._load(decoded)))
        if not error < ROUNDED[scheme]:
            yield f"its logits differ by {error:.3f} from what transformers computes with its weights"

    def _load(self, path: Path) -> Any:
        import transformers

        return getattr(transformers, self.family.reference).from_pretrained(path)

    def _run(self, model: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            return [model(**inputs, use_cache=False).logits for inputs in self.inputs]


_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64}


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Median over the samples of the relative difference in norm: one token that changes its expert is no fault."""
    errors = [
        ((one - other).float().norm() / other.float().norm()).item()
        for one, other in zip(actual, expected, strict=True)
    ]
    return float(np.median(errors))


def make_runs(path: Path) -> dict[str, FamilyRun]:
    """All families, nothing done yet."""
    write_samples(path / "samples")
    return {name: FamilyRun(name, path / name, path / "samples") for name in FAMILIES}
