# SPDX-License-Identifier: Apache-2.0
"""The saver of the ascendv1 format, which vLLM-Ascend reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from modelslim_ascendv1.caches import CACHE_TYPE, GLOBAL, cache_sizes, encode_cache, read_caches
from modelslim_ascendv1.decode import read_layout
from modelslim_ascendv1.encode import encode
from modelslim_ascendv1.in_vllm_ascend import ask_vllm_ascend
from modelslim_ascendv1.layout import (
    DESCRIPTION,
    FLOAT_TYPE,
    MULTIPLIER,
    SPARSE_FLOAT,
    TYPES,
    groups_of,
    is_row_parallel,
    layout,
    sizes,
    type_of,
)
from modelslim_ascendv1.rules import find_problems
from modelslim_ascendv1.schemes import refusals

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 1 << 30


class AscendV1Saver(Saver):
    """Writes quantized linears with the tensor names, types and layouts of ascendv1.

    Args:
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file.
    """

    engine = "vllm-ascend"
    stores_multipliers = True
    stores_caches = True
    stores_sparse = True

    def __init__(self, part_file_size: float = 4) -> None:
        self._max_shard_bytes = ceil(part_file_size * _GIB)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AscendV1Saver:
        """See ``Saver.from_config``; the fields are documented in ascendv1_saver.schema.json."""
        return cls(config.get("part_file_size", 4))

    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files."""
        return "quant_model_weights"

    @property
    def max_shard_bytes(self) -> int:
        """Size that a weight file does not exceed; 0 for no limit."""
        return self._max_shard_bytes

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """What ascendv1 cannot hold, or vLLM-Ascend cannot run; see the README for all rules."""
        return find_problems(model)

    def scale_dtypes(self, spec: QuantSpec, model_dtype: str) -> tuple[str, str]:
        """Dtypes of the engine's parameters, to which it converts what is stored."""
        if spec.activation.scope == "pd_mix":
            return model_dtype, model_dtype
        if spec.is_static:
            # Of the weight's scale only the product with the input's is stored, deq_scale in float32.
            return "float32", model_dtype
        if spec.is_dynamic and spec.weight.dtype != "int8":
            return "float32", "float32"
        return model_dtype, "float32"

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode``.

        Raises:
            SaveError: a bias of a W8A8 linear does not fit into the 32 bits that the format has for it.
        """
        return encode(name, module, model_dtype)

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.encoded_sizes``."""
        for refusal in refusals(spec):
            raise SaveError(f"{linear.name}: ascendv1 has no type for {refusal.what}", hint=refusal.hint)
        tensors = layout(
            spec.scheme,
            linear.out_features,
            linear.in_features,
            groups_of(spec, linear.in_features),
            row_parallel=is_row_parallel(linear.stored),
            model_dtype=linear.dtype if spec.scheme == SPARSE_FLOAT else model_dtype,
            has_bias=linear.has_bias,
            symmetric=spec.weight.symmetric,
            has_multiplier=linear.has_multiplier,
        )
        return {f"{linear.stored}.{part}": nbytes for part, nbytes in sizes(tensors).items()}

    def cache_scale_dtype(self, model_dtype: str) -> str:
        """That of the model, to which the engine converts what is stored."""
        return model_dtype

    def encode_cache(self, cache: CacheInfo, module: QuantizedCache, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode_cache``."""
        return encode_cache(cache, module)

    def cache_sizes(self, cache: CacheInfo, spec: TensorSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.cache_sizes``."""
        return cache_sizes(cache)

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """The description file: the type of every tensor, and what is true of the whole model."""
        specs = {record.spec for record in records if record.spec is not None}
        group_sizes = {spec.weight.group_size for spec in specs if spec.weight.group_size}
        description: dict[str, Any] = {
            "version": "1.0.0",
            "model_quant_type": max((spec.scheme for spec in specs), key=TYPES.index, default=FLOAT_TYPE),
            "group_size": max(group_sizes, default=0),
            "metadata": {},
            "optional": {},
        }
        if any(record.cache for record in records):
            description |= GLOBAL
        for record in records:
            if record.cache is not None:
                description[record.name] = CACHE_TYPE
                continue
            part = MULTIPLIER if record.name.endswith(f".{MULTIPLIER}") else record.name.rpartition(".")[2]
            description[record.name] = FLOAT_TYPE if record.spec is None else type_of(part, record.spec.scheme)
        return {DESCRIPTION: description}

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """Remove ``quantization_config`` everywhere: the engine would read it instead of the description."""
        return without_quantization(config)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """True when the directory holds a description file."""
        return (path / DESCRIPTION).is_file()

    @classmethod
    def read_caches(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedCache]:
        """See ``Saver.read_caches``.

        Raises:
            ModelError: a scale or an offset is missing; names it.
        """
        return read_caches(shapes)

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """See ``Saver.read_layout``.

        Raises:
            ModelError: the description and the tensors contradict each other; names the tensor.
        """
        return read_layout(path, shapes)

    @classmethod
    def ask_engine(cls, engine: str, path: Path, model: PlannedModel, tensors: Mapping[str, Tensor]) -> EngineAnswer:
        """See ``Saver.ask_engine``; vllm-ascend is asked."""
        if engine == cls.engine:
            return ask_vllm_ascend(path, model, tensors)
        return super().ask_engine(engine, path, model, tensors)
