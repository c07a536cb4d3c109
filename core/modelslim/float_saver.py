# SPDX-License-Identifier: Apache-2.0
"""The target ``float`` of a conversion: every quantized linear becomes the float weight that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelslim.errors import ModelError
from modelslim.saved_config import without_quantization
from modelslim.saver import PlannedModel, SavedLinear, Saver, TensorRecord
from modelslim.types import LinearInfo, Problem, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

    from modelslim.quantized import QuantizedLinear

_GIB = 1 << 30


class FloatSaver(Saver):
    """Writes a checkpoint as its publisher would: ``<linear>.weight`` in the model's dtype.

    Args:
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file.
    """

    stores_multipliers = True  # in the weight
    stores_sparse = True

    def __init__(self, part_file_size: float = 4) -> None:
        self._max_shard_bytes = ceil(part_file_size * _GIB)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FloatSaver:
        """See ``Saver.from_config``."""
        return cls(config.get("part_file_size", 4))

    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files."""
        return "model"

    @property
    def max_shard_bytes(self) -> int:
        """Size that a weight file does not exceed; 0 for no limit."""
        return self._max_shard_bytes

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """Biases that the architecture has no place for."""
        first = next(iter(sorted(model.added_biases)), None)
        if first is None:
            return ()
        more = f" and {len(model.added_biases) - 1} more" if len(model.added_biases) > 1 else ""
        return [
            Problem(
                f"{first}{more} has a bias that smoothing gave it, and the float model is built without",
                hint="take the float model that this one was made from",
                linear=first,
            )
        ]

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """The weight, rounded once from float32, and the bias.

        What the input is multiplied by becomes part of the weight.
        """
        dtype: torch.dtype = getattr(torch, model_dtype)
        weight = module.weight.dequantize()
        if module.input_multiplier is not None:
            weight = weight.mul_(module.input_multiplier)
        yield f"{name}.weight", weight.to(dtype)
        if module.bias is not None:
            yield f"{name}.bias", module.bias.to(dtype)

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.encoded_sizes``."""
        dtype: torch.dtype = getattr(torch, model_dtype)
        rows = linear.out_features * dtype.itemsize
        sizes = {f"{linear.stored}.weight": rows * linear.in_features}
        return {**sizes, f"{linear.stored}.bias": rows} if linear.has_bias else sizes

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """Nothing: there are no files beside config.json."""
        return {}

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """Remove what it says of quantization."""
        return without_quantization(config)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """False: a float checkpoint has no quantized linears to be read."""
        return False

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """Not to be asked.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{path}: a float checkpoint has no quantized linears")
