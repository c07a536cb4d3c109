# SPDX-License-Identifier: Apache-2.0
"""The base class of savers: one entry of ``save`` in the protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelslim.types import LinearInfo, Problem, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

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
    """

    config: Mapping[str, Any]
    dtype: str
    linears: Mapping[str, LinearInfo]
    specs: Mapping[str, QuantSpec]
    tensors: frozenset[str]
    added_biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that was written.

    Attributes:
        name: its name in the result.
        spec: scheme of the quantized linear that it belongs to; None for a tensor that was copied.
        nbytes: its size.
    """

    name: str
    spec: QuantSpec | None
    nbytes: int


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


class Saver(ABC):
    """A codec between quantized modules and the tensors and files of one format.

    It never quantizes and never touches the disk; the core writes what it yields.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Saver:
        """Make the saver from its entry of ``save``, which its JSON Schema fragment has accepted."""

    @property
    @abstractmethod
    def weights_name(self) -> str:
        """Stem of the weight files: ``<stem>-00001-of-00002.safetensors``."""

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

    @abstractmethod
    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """The JSON files of the format, by file name, once all tensors are written."""

    def edit_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json as the engine wants it; the argument is a copy that may be changed."""
        return config

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """True when the directory holds a checkpoint of this format."""

    @classmethod
    @abstractmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """The quantized linears of such a checkpoint, by stored name.

        Args:
            path: the directory.
            shapes: every tensor of the checkpoint with its shape.
        """
