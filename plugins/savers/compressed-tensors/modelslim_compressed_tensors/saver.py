# SPDX-License-Identifier: Apache-2.0
"""The saver of the compressed-tensors format, which vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelslim.api import (
    CacheInfo,
    EngineAnswer,
    LinearInfo,
    PlannedModel,
    Problem,
    QuantizedCache,
    QuantizedLinear,
    QuantSpec,
    SavedCache,
    SavedLinear,
    SaveError,
    Saver,
    TensorRecord,
    TensorSpec,
    without_quantization,
)
from modelslim_compressed_tensors.caches import encode_cache, read_caches, scale_name
from modelslim_compressed_tensors.config import quantization_config
from modelslim_compressed_tensors.decode import KEY, read_config, read_layout, recognizes
from modelslim_compressed_tensors.encode import encode
from modelslim_compressed_tensors.engine import check_config
from modelslim_compressed_tensors.formats import layout, sizes
from modelslim_compressed_tensors.in_transformers import ask_transformers
from modelslim_compressed_tensors.rules import find_problems
from modelslim_compressed_tensors.schemes import refusals

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 1 << 30


class CompressedTensorsSaver(Saver):
    """Writes quantized linears with the tensor names, types and layouts of compressed-tensors.

    Args:
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file.
    """

    engine = "vllm"
    stores_caches = True

    def __init__(self, part_file_size: float = 4) -> None:
        self._max_shard_bytes = ceil(part_file_size * _GIB)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsSaver:
        """See ``Saver.from_config``; the fields are documented in compressed_tensors_saver.schema.json."""
        return cls(config.get("part_file_size", 4))

    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files."""
        return "model"

    @property
    def max_shard_bytes(self) -> int:
        """Size that a weight file does not exceed; 0 for no limit."""
        return self._max_shard_bytes

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """What compressed-tensors cannot hold, or vLLM and transformers cannot run; see the README for all rules."""
        return find_problems(model)

    def scale_dtypes(self, spec: QuantSpec, model_dtype: str) -> tuple[str, str]:
        """Dtypes in which scales are stored, which the engines' own parameters hold without loss."""
        return model_dtype, model_dtype if spec.is_static else "float32"

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode``."""
        return encode(name, module, model_dtype)

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.encoded_sizes``."""
        for refusal in refusals(spec):
            raise SaveError(f"{linear.name}: compressed-tensors does not have {refusal.what}", hint=refusal.hint)
        tensors = layout(spec, linear.out_features, linear.in_features, model_dtype, has_bias=linear.has_bias)
        return {f"{linear.stored}.{part}": nbytes for part, nbytes in sizes(tensors).items()}

    def cache_scale_dtype(self, model_dtype: str) -> str:
        """That in which scales are stored."""
        return model_dtype

    def encode_cache(self, cache: CacheInfo, module: QuantizedCache, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode_cache``."""
        return encode_cache(cache, module, model_dtype)

    def cache_sizes(self, cache: CacheInfo, spec: TensorSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.cache_sizes``."""
        return {scale_name(cache.stored): getattr(torch, model_dtype).itemsize}

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """Nothing: the format has no file of its own."""
        return {}

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """Say in ``quantization_config`` which linears are quantized and how; what the source says of it goes."""
        edited = without_quantization(config)
        described = quantization_config(records, model)
        return edited if described is None else {**edited, KEY: described}

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """True when config.json says that the checkpoint is of this format."""
        return recognizes(path)

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """See ``Saver.read_layout``.

        Raises:
            ModelError: config.json and the tensors contradict each other; names the tensor.
        """
        return read_layout(path, shapes)

    @classmethod
    def read_caches(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedCache]:
        """See ``Saver.read_caches``.

        Raises:
            ModelError: config.json and the tensors contradict each other; names the tensor.
        """
        return read_caches(read_config(path), shapes)

    @classmethod
    def check_files(cls, path: Path) -> Sequence[Problem]:
        """What the compressed-tensors package, where it is installed, says of ``quantization_config``."""
        return check_config(path / "config.json")

    @classmethod
    def ask_engine(cls, engine: str, path: Path, model: PlannedModel, tensors: Mapping[str, Tensor]) -> EngineAnswer:
        """See ``Saver.ask_engine``; transformers is asked, with the compressed-tensors package."""
        if engine == "transformers":
            return ask_transformers(path, model, tensors)
        return super().ask_engine(engine, path, model, tensors)
