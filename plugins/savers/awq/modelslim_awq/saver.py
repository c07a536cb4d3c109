# SPDX-License-Identifier: Apache-2.0
"""The saver of the AWQ format, which vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelslim.api import (
    LinearInfo,
    ModelError,
    PlannedModel,
    Problem,
    QuantizedLinear,
    QuantSpec,
    SavedLinear,
    SaveError,
    Saver,
    TensorRecord,
    without_quantization,
)
from modelslim_awq.codec import PER_WORD, decode, encode, layout, scale_dtype, sizes
from modelslim_awq.config import quantization_config, read_config, scheme_of
from modelslim_awq.rules import find_problems
from modelslim_awq.schemes import refusals

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 1 << 30


class AwqSaver(Saver):
    """Writes int4 weights with the tensor names and layouts of AWQ.

    Args:
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file.
    """

    engine = "vllm"

    def __init__(self, part_file_size: float = 4) -> None:
        self._max_shard_bytes = ceil(part_file_size * _GIB)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AwqSaver:
        """See ``Saver.from_config``; the fields are documented in awq_saver.schema.json."""
        return cls(config.get("part_file_size", 4))

    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files."""
        return "model"

    @property
    def max_shard_bytes(self) -> int:
        """Size that a weight file does not exceed; 0 for no limit."""
        return self._max_shard_bytes

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """What AWQ cannot hold, or its readers cannot run; see the README for all rules."""
        return find_problems(model)

    def scale_dtypes(self, spec: QuantSpec, model_dtype: str) -> tuple[str, str]:
        """Dtypes of the readers' parameters."""
        return scale_dtype(model_dtype), "float32"

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode``.

        Raises:
            SaveError: the format cannot hold the linear.
        """
        return encode(name, module, model_dtype)

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.encoded_sizes``."""
        for refusal in refusals(spec):
            raise SaveError(f"{linear.name}: AWQ has no {refusal.what}", hint=refusal.hint)
        groups = linear.in_features // (spec.weight.group_size or linear.in_features)
        tensors = layout(
            linear.out_features,
            linear.in_features,
            groups,
            model_dtype=model_dtype,
            has_bias=linear.has_bias,
        )
        return {f"{linear.stored}.{part}": nbytes for part, nbytes in sizes(tensors).items()}

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """The format has no files of its own."""
        return {}

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """Put ``quantization_config`` in the place of what the source had."""
        section = quantization_config(records, model)
        return {**without_quantization(config), **({"quantization_config": section} if section else {})}

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """True when config.json says so."""
        return read_config(path) is not None

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """See ``Saver.read_layout``.

        Raises:
            ModelError: config.json and the tensors contradict each other, or say what is not read here.
        """
        section = read_config(path)
        if section is None:
            raise ModelError(f"{path / 'config.json'} does not say that quant_method is awq")
        spec = QuantSpec(scheme_of(section, path))
        found = {}
        for key, shape in shapes.items():
            name, _, part = key.rpartition(".")
            if part == "qweight":
                tensors = _tensors_of(name, spec, shape, shapes)
                found[name] = SavedLinear(spec, tensors, partial(decode, name, spec))
        return found


def _tensors_of(
    name: str, spec: QuantSpec, packed: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Full names of the tensors of a linear, whose shapes must be those of its scheme."""
    rows, columns = packed[-1] * PER_WORD, packed[0]
    size = spec.weight.group_size or columns
    if not size or columns % size:
        raise ModelError(
            f"{name}.qweight holds {columns} inputs, which groups of {size} do not divide",
            hint="the checkpoint is damaged, or config.json is not its own; quantize again",
        )
    groups = columns // size
    expected = layout(rows, columns, groups, model_dtype="float16", has_bias=f"{name}.bias" in shapes)
    for part, (_, shape) in expected.items():
        full = f"{name}.{part}"
        if shapes.get(full) != shape:
            raise ModelError(
                f"{full} has shape {shapes[full]}, and a linear of {rows} outputs and {columns} inputs has {shape} here"
                if full in shapes
                else f"{name} has a qweight and no tensor {full}",
                hint="the checkpoint is damaged, or config.json is not its own; quantize again",
            )
    return tuple(f"{name}.{part}" for part in expected)
