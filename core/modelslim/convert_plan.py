# SPDX-License-Identifier: Apache-2.0
"""Finds out, before anything is written, whether a checkpoint can be converted exactly; reads all that is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from modelslim.convert_source import Piece, Source, open_source
from modelslim.engine_rules import check_model, choose_target
from modelslim.errors import CapabilityError, Diagnostic, SaveError, UsageError, nearest
from modelslim.exactness import Loss, as_plain_cache, lost, lost_of_caches, round_scales, told_once, unexplained
from modelslim.float_saver import FloatSaver
from modelslim.kv_cache import QuantizedCache
from modelslim.model_info import other_matrices
from modelslim.quantized import QuantizedLinear
from modelslim.registry import Registry
from modelslim.saved_config import without_quantization
from modelslim.saver import PlannedModel, Saver, TensorRecord
from modelslim.types import LinearInfo, QuantSpec, TensorSpec

FLOAT = "float"
"""The target that is no saver's format: the model's own dtype, without quantization."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that is possible.

    Attributes:
        source: the checkpoint.
        format: name of the saver that writes the result, or ``FLOAT``.
        saver: writes the result.
        planned: what the saver is told of it.
        sizes: name and bytes of every tensor of the result.
        specs: schemes of the quantized linears of the source, by stored name.
        warnings: what the user should know.
        registry: the installed plugins.
        round_scales: True when scales are rounded to what the engine holds.
    """

    source: Source
    format: str
    saver: Saver
    planned: PlannedModel
    sizes: Mapping[str, int]
    specs: Mapping[str, QuantSpec]
    warnings: Sequence[str]
    registry: Registry
    round_scales: bool

    @property
    def to_float(self) -> bool:
        """True when the result is not quantized."""
        return self.format == FLOAT


def plan_conversion(
    path: Path,
    to: str,
    *,
    part_file_size: float | None = None,
    engine: str | None = None,
    tp: int = 1,
    round_scales: bool = False,
    trust_remote_code: bool = False,
    observers: Sequence[tuple[str, object]] = (),
) -> Conversion:
    """See :func:`modelslim.convert.convert`.

    Raises:
        CapabilityError: the format does not hold what the checkpoint holds; one diagnostic for each kind of loss.
    """
    registry = Registry.scan()
    saver = make_saver(to, part_file_size, registry)
    if to == FLOAT and engine is not None:
        raise UsageError("--engine says what a quantized result must be, and this one is float", hint="leave it out")
    target = choose_target(engine, tp, saver, registry)
    source = open_source(path, registry, trust_remote_code, observers)
    if source.saver is None and to != FLOAT:
        raise UsageError(
            f"{path} holds a float model in another form, which becomes a plain one with --to {FLOAT}",
            hint="`modelslim quant` reads it as it is",
        )
    found = _Examination(source, saver, to == FLOAT, round_scales and to != FLOAT)
    with source.checkpoint:
        found.read()
    planned = found.planned()
    problems = check_model(saver, to, target, planned)
    fatal = [Diagnostic(problem.message, hint=problem.hint) for problem in problems if problem.fatal]
    if not fatal:
        found.encode_caches(planned)
    # Of a scheme that the saver refuses it has told above.
    mistakes = [*fatal, *told_once(found.losses), *(() if fatal else told_once(found.refused))]
    if mistakes:
        raise CapabilityError(
            f"{path} cannot become {to} without loss", diagnostics=list({str(one): one for one in mistakes}.values())
        )
    warnings = [str(Diagnostic(problem.message, hint=problem.hint)) for problem in problems]
    if to == FLOAT and source.caches:
        warnings.append(f"the scales of {len(source.caches)} key/value caches are left out: the cache becomes float")
    if found.change:
        warnings.append(f"scales were rounded to what the format's engine holds, by up to {found.change:.2%}")
    sizes = {record.name: record.nbytes for record in found.records}
    return Conversion(source, to, saver, planned, sizes, found.specs, warnings, registry, found.round_scales)


def make_saver(to: str, part_file_size: float | None, registry: Registry) -> Saver:
    """The saver of a format.

    Raises:
        UsageError: there is none of that name.
    """
    config = {} if part_file_size is None else {"part_file_size": part_file_size}
    if to == FLOAT:
        return FloatSaver.from_config(config)
    if not registry.claims("savers", to):
        raise UsageError(f"no format is called {to!r}", hint=nearest(to, [*registry.names("savers"), FLOAT]))
    saver: Saver = registry.load("savers", to).from_config({"type": to, **config})
    return saver


def decode(piece: Piece, tensors: Mapping[str, Tensor]) -> QuantizedLinear | QuantizedCache:
    """The linear or the cache that stored tensors hold."""
    assert piece.saved is not None
    module = piece.saved.decode(tensors)
    return as_plain_cache(module) if isinstance(module, QuantizedCache) else module


@dataclass
class _Examination:
    """What reading all quantized linears of a source tells.

    Attributes:
        source: the checkpoint.
        saver: writes the result.
        to_float: True when the result is float and need not keep codes and scales.
        round_scales: True when scales are to be rounded to what the engine holds.
        linears: the linears as they turned out to be, by name in the model.
        specs: their schemes by stored name.
        cache_specs: what caches become, by name of the place.
        caches: the caches, by the same names.
        records: all tensors of the result.
        losses: what the result would not keep.
        refused: linears that the saver does not encode.
        change: the largest relative change of a scale that was rounded.
    """

    source: Source
    saver: Saver
    to_float: bool
    round_scales: bool
    linears: dict[str, LinearInfo] = field(default_factory=dict)
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    cache_specs: dict[str, TensorSpec] = field(default_factory=dict)
    caches: dict[str, QuantizedCache] = field(default_factory=dict)
    records: list[TensorRecord] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    refused: list[Loss] = field(default_factory=list)
    change: float = 0.0

    def read(self) -> None:
        """Read them, one at a time."""
        source = self.source
        self.linears.update(source.info.linears)
        pieces = source.pieces()
        with TemporaryDirectory(prefix="modelslim-") as name:
            for number, (file, held) in enumerate(pieces.items()):
                source.session.unit_started(f"{file.name} (check)", number, 2 * len(pieces))
                for piece in held:
                    if piece.saved is None:
                        self.records.append(
                            TensorRecord(piece.name, None, source.checkpoint.tensors[piece.name].nbytes)
                        )
                        continue
                    tensors = {one: source.checkpoint.read(one) for one in piece.saved.tensors}
                    module = decode(piece, tensors)
                    if isinstance(module, QuantizedCache):
                        self._cache(piece.name, module)
                    else:
                        self._linear(piece.name, module, tensors, Path(name))

    def planned(self) -> PlannedModel:
        """The result as a saver looks at a plan."""
        source = self.source
        copied = source.copied
        model, checkpoint = source.info.linears, source.checkpoint
        for name, linear in model.items():
            if linear.stored not in self.specs and f"{linear.stored}.bias" in checkpoint.tensors:
                self.linears[name] = replace(linear, has_bias=True)
        weights = {f"{stored}.weight" for stored in self.specs}
        shapes = {name: checkpoint.tensors[name].shape for name in copied}
        return PlannedModel(
            without_quantization(checkpoint.config),
            source.info.dtype,
            self.linears,
            {source.linears[stored].name: spec for stored, spec in self.specs.items()},
            frozenset(weights.union(copied)),
            frozenset(name for name, one in self.linears.items() if one.has_bias and not model[name].has_bias),
            other_matrices(source.model, source.info, source.loader, shapes),
            {place.name: place for place in source.places.values() if place.name in self.cache_specs},
            self.cache_specs,
        )

    def _linear(self, stored: str, module: QuantizedLinear, tensors: Mapping[str, Tensor], folder: Path) -> None:
        assert self.source.saver is not None
        dtype = self.source.info.dtype
        linear = replace(
            self.source.linears[stored],
            has_bias=module.bias is not None,
            has_multiplier=module.input_multiplier is not None,
        )
        self.linears[linear.name], self.specs[stored] = linear, module.spec
        self.losses += unexplained(self.source.saver, stored, module, tensors, dtype)
        if self.round_scales:
            self.change = max(self.change, round_scales(self.saver, module, dtype))
        if linear.has_multiplier and not self.saver.stores_multipliers:
            self.losses.append(Loss(stored, "its input is multiplied, and the format has no place for that"))
            return
        if module.spec.weight.sparse and not self.saver.stores_sparse:
            self.refused.append(Loss(stored, "the format has no type for sparse weights"))
            return
        try:
            for name, tensor in self.saver.encode(stored, module, dtype):
                self.records.append(TensorRecord(name, module.spec, tensor.nbytes))
            if not self.to_float:
                self.losses += lost(self.saver, linear, module, dtype, folder)
        except SaveError as error:
            self.refused.append(Loss(stored, error.message.removeprefix(f"{stored}: "), hint=error.hint))

    def _cache(self, stored: str, module: QuantizedCache) -> None:
        if self.saver.stores_caches:
            place = self.source.places[stored].name
            self.caches[place], self.cache_specs[place] = module, module.spec
        elif not self.to_float:
            self.losses.append(Loss(stored, "it fills a quantized key/value cache, which the format has no place for"))

    def encode_caches(self, model: PlannedModel) -> None:
        """Go on with the caches, of a model that the saver accepts."""
        for place, module in self.caches.items():
            for name, tensor in self.saver.encode_cache(model.caches[place], module, model.dtype):
                self.records.append(TensorRecord(name, None, tensor.nbytes, module.spec))
        if self.caches:
            with TemporaryDirectory(prefix="modelslim-") as name:
                self.losses += lost_of_caches(self.saver, self.caches, model, self.records, Path(name))
