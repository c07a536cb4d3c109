# SPDX-License-Identifier: Apache-2.0
"""The saver of the format of MindIE-SD: tensors as in ascendv1, in files that are named after their type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from modelslim_ascendv1.decode import read_layout
from modelslim_ascendv1.encode import encode
from modelslim_ascendv1.layout import FLOAT_TYPE, MULTIPLIER, groups_of, layout, sizes
from modelslim_mindie.rules import TYPES, find_problems, refusals

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 1 << 30
_AS_OF = "bfloat16"
"""Of models of this dtype ascendv1 stores ``deq_scale`` in float32, as this format does of all."""

DESCRIPTION = "quant_model_description"
WEIGHTS = "quant_model_weight"


class MindieSaver(Saver):
    """Writes quantized linears with the tensor names, types and layouts that MindIE-SD reads.

    Args:
        part_file_size: GiB after which a new weight file begins; 0 puts all into one file.
    """

    engine = "mindie"
    stores_multipliers = True

    def __init__(self, part_file_size: float = 4) -> None:
        self._max_shard_bytes = ceil(part_file_size * _GIB)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MindieSaver:
        """See ``Saver.from_config``; the fields are documented in mindie_format_saver.schema.json."""
        return cls(config.get("part_file_size", 4))

    def weights_name(self, model: PlannedModel) -> str:
        """Stem of the weight files; a single file is named after the type of the model."""
        return WEIGHTS if self._max_shard_bytes else f"{WEIGHTS}{_suffix(model)}"

    @property
    def max_shard_bytes(self) -> int:
        """Size that a weight file does not exceed; 0 for no limit."""
        return self._max_shard_bytes

    def check(self, model: PlannedModel) -> Sequence[Problem]:
        """What the format cannot hold; see the README for all rules."""
        return find_problems(model)

    def encode(self, name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
        """See ``Saver.encode``.

        Raises:
            SaveError: the format has no type for the linear's scheme, or a bias of a W8A8 linear does not fit into
                the 32 bits that the format has for it.
        """
        _demand(name, module.spec)
        return encode(name, module, _AS_OF)

    def encoded_sizes(self, linear: LinearInfo, spec: QuantSpec, model_dtype: str) -> Mapping[str, int]:
        """See ``Saver.encoded_sizes``."""
        _demand(linear.name, spec)
        tensors = layout(
            spec.scheme,
            linear.out_features,
            linear.in_features,
            groups_of(spec, linear.in_features),
            row_parallel=False,  # makes a difference to W4A8 only
            model_dtype=_AS_OF,
            has_bias=linear.has_bias,
            symmetric=spec.weight.symmetric,
            has_multiplier=linear.has_multiplier,
        )
        return {f"{linear.stored}.{part}": nbytes for part, nbytes in sizes(tensors).items()}

    def finish(self, records: Sequence[TensorRecord], model: PlannedModel) -> Mapping[str, Any]:
        """The description file: the type of every tensor, and of the whole model."""
        specs = [record.spec for record in records if record.spec is not None]
        description = {"model_quant_type": _strongest(specs)}
        for record in records:
            spec = None if record.name.endswith((".bias", f".{MULTIPLIER}")) else record.spec
            description[record.name] = FLOAT_TYPE if spec is None else spec.scheme
        return {f"{DESCRIPTION}{_suffix(model)}.json": description}

    def edit_config(
        self, config: dict[str, Any], records: Sequence[TensorRecord], model: PlannedModel
    ) -> dict[str, Any]:
        """Remove ``quantization_config``, which speaks of the source's tensors."""
        return without_quantization(config)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """True when the directory holds a description file that is named after a type."""
        return bool(_descriptions(path))

    @classmethod
    def read_layout(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, SavedLinear]:
        """See ``Saver.read_layout``.

        Raises:
            ModelError: there are several descriptions, or description and tensors contradict each other.
        """
        found = _descriptions(path)
        if len(found) != 1:
            raise ModelError(
                f"{path} holds {len(found)} description files: {', '.join(found)}",
                hint="one checkpoint has one; remove those of others",
            )
        return read_layout(path, shapes, found[0])


def _demand(name: str, spec: QuantSpec) -> None:
    for refusal in refusals(spec):
        raise SaveError(f"{name}: the format of MindIE-SD has no type for {refusal.what}", hint=refusal.hint)


def _strongest(specs: Iterable[QuantSpec]) -> str:
    """Type of a model that holds linears of these schemes."""
    return max((spec.scheme for spec in specs), key=TYPES.index, default=FLOAT_TYPE)


def _suffix(model: PlannedModel) -> str:
    """What the planned type adds to the names of files."""
    return f"_{_strongest(model.specs.values()).lower()}" if model.specs else ""


def _descriptions(path: Path) -> list[str]:
    names = (f"{DESCRIPTION}_{type_.lower()}.json" for type_ in TYPES)
    return [name for name in names if (path / name).is_file()]
