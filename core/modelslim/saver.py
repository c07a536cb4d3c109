# SPDX-License-Identifier: Apache-2.0
"""The base class of savers: one entry of ``save`` in the protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modelslim.types import CacheInfo, LinearInfo, Problem, QuantSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from modelslim.kv_cache import QuantizedCache
    from modelslim.quantized import QuantizedLinear


@dataclass(frozen=True)
class PlannedModel:
    """What a saver may know of the run while planning.

    Attributes:
        config: the source's config.json.
        dtype: the model's dtype, such as ``bfloat16``.
        linears: every linear of the model, by name.
        specs: what the quantized ones become, by name.
        tensors: names of all tensors of the source checkpoint.
        added_biases: names of the linears that have a bias only because smoothing adds it.
        matrices: owners of other weights that an engine may take for linears: routers, convolutions, whatever the
            adapter leaves out of the model; no embeddings.
        caches: the key/value caches that are quantized, by name.
        cache_specs: what they become, by name.
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, LinearInfo]
    specs: Mapping[str, QuantSpec]
    tensors: frozenset[str]
    added_biases: frozenset[str] = frozenset()
    matrices: frozenset[str] = frozenset()
    caches: Mapping[str, CacheInfo] = field(default_factory=dict)
    cache_specs: Mapping[str, TensorSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that was written.

    Attributes:
        name: its name in the result.
        spec: scheme of the quantized linear that it belongs to; None for a tensor that was copied.
        nbytes: its size.
        cache: scheme of the key/value cache that it belongs to; None for all else.
    """

    name: str
    spec: QuantSpec | None
    nbytes: int
    cache: TensorSpec | None = None


@dataclass(frozen=True)
class SavedCache:
    """What a checkpoint says of the cache of keys or values.

    Attributes:
        spec: what they become.
        tensors: names of the tensors that say so.
        decode: makes the module from those tensors, by name.
    """

    spec: TensorSpec
    tensors: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor]], QuantizedCache]


@dataclass(frozen=True)
class SavedLinear:
    """A quantized linear found in a checkpoint of this format.

    Attributes:
        spec: its scheme.
        tensors: names of the tensors that hold it.
        decode: makes the module from those tensors, by name.
    """

    spec: QuantSpec
    tensors: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor]], QuantizedLinear]


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine's own Python says of a checkpoint.

    Attributes:
        asked: what was asked, with versions, such as ``transformers 5.23.0 with compressed-tensors 0.20.0``; empty when
            nothing could be.
        problems: what it refuses, and what it would leave out or pass over.
        reason: why it could not be asked, or what of the checkpoint it was not asked about; empty when all was asked.
    """

    asked: str = ""
    problems: Sequence[Problem] = ()
    reason: str = ""


class Saver(ABC):
    """A codec between quantized modules and the tensors and files of one format.

    It never quantizes and never touches the disk; the core writes what it yields.

    Attributes:
        engine: the engine that the format is for, by the word for ``--engine``: where the user names none, the plan
            warns of what this one does not load. Empty: none is known.
        stores_multipliers: True when the format has a place for the ``input_multiplier`` of a linear; the plan
            refuses to make one otherwise.
        stores_caches: True when the format has a place for the scales of key/value caches.
        stores_sparse: True when the format has types for ``sparse`` weights; the plan refuses to make some otherwise.
    """

    engine: ClassVar[str] = ""
    stores_multipliers: ClassVar[bool] = False
    stores_caches: ClassVar[bool] = False
    stores_sparse: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Saver:
        """Make the saver from its entry of ``save``, which its JSON Schema fragment has accepted."""

    @classmethod
    def of_checkpoint(cls, path: Path) -> Saver:
        """A saver that writes as the one that wrote a checkpoint; by default one with the defaults of the protocol."""
        return cls.from_config({})

    @abstractmethod
    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files: ``<stem>-00001-of-00002.safetensors``.

        Args:
            model: as ``check`` saw it.
        """

    @property
    @abstractmethod
    def max_shard_bytes(self) -> int:
        """Roll to a new weight file before this size is exceeded; 0 puts all into one file."""

    @abstractmethod
    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """What this format, or the engine that reads it, does not allow; found before a weight is read."""

    def scale_dtypes(self, spec: QuantSpec, model_dtype: str) -> tuple[str, str]:
        """Dtypes in which the engine holds the scales of (weight, activation) of a linear with this spec."""
        return "float32", "float32"

    @abstractmethod
    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors that store a quantized linear; leaves the module alone.

        Args:
            name: the linear's stored name, without ``.weight``.
            module: the linear, on the CPU.
            model_dtype: dtype of the model, such as ``bfloat16``.
        """

    @abstractmethod
    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """Name and bytes of each tensor that ``encode`` will yield, for the plan."""

    def cache_scale_dtype(self, model_dtype: str) -> str:
        """Dtype in which the engine holds the scales of key/value caches."""
        return "float32"

    def encode_cache(self, cache: CacheInfo, module: QuantizedCache, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors that store what a cache does to keys or values; asked only of a format that ``stores_caches``."""
        raise NotImplementedError

    def cache_sizes(self, cache: CacheInfo, spec: TensorSpec, model_dtype: str) -> Mapping[str, int]:
        """Name and bytes of each tensor that ``encode_cache`` will yield, for the plan."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """The JSON files of the format, by file name, once all tensors are written."""

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """config.json as the engine wants it, once all tensors are written.

        Args:
            config: the source's; a copy that may be changed.
            records: what was written.
            model: as ``check`` saw it.
        """
        return config

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """True when the directory holds a checkpoint of this format."""

    @classmethod
    def read_caches(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedCache]:
        """The quantized caches of such a checkpoint, by the stored name of the linear that fills each.

        Args:
            path: the directory.
            shapes: every tensor of the checkpoint with its shape.
        """
        return {}

    @classmethod
    @abstractmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """The quantized linears of such a checkpoint, by stored name.

        Args:
            path: the directory.
            shapes: every tensor of the checkpoint with its shape.
        """

    @classmethod
    def check_files(cls, path: Path) -> Sequence[Problem]:
        """What else is wrong with the files of such a checkpoint, beside what ``read_layout`` raises.

        Args:
            path: the directory.
        """
        return ()

    @classmethod
    def ask_engine(cls, engine: str, path: Path, model: PlannedModel, tensors: Mapping[str, Tensor]) -> EngineAnswer:
        """What the Python of an engine, where it is installed, says of such a checkpoint; no data is read.

        Asked by ``verify --engine`` only, since engines are slow to import.

        Args:
            engine: the word for ``--engine``, without a version.
            path: the directory.
            model: the model as it was read from the checkpoint.
            tensors: every tensor of the checkpoint on meta, by name.
        """
        return EngineAnswer(reason=f"there is no way to ask {engine} about this format")
