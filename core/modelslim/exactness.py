# SPDX-License-Identifier: Apache-2.0
"""What a quantized linear loses on its way from one format into another, in words; nothing when the way is exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelslim.disk import write_json
from modelslim.errors import Diagnostic
from modelslim.kv_cache import QuantizedCache
from modelslim.quantized import QuantizedLinear
from modelslim.saver import PlannedModel, SavedLinear, Saver, TensorRecord
from modelslim.types import MICROSCALING, LinearInfo, QuantSpec

_FIELDS: Mapping[str, str] = {
    "codes": "codes",
    "scale": "weight scales",
    "offset": "weight offsets",
    "whole_scale": "scales of whole weights",
    "bias": "values of its bias",
    "input_scale": "scales of its input",
    "input_offset": "offsets of its input",
    "input_multiplier": "multipliers of its input",
}
_ZERO_WHEN_ABSENT = frozenset({"offset", "input_offset"})
_AGAIN = "quantize the float model for this format"
_ROUND = f"{_AGAIN}; or round them, with --round_scales"
_LAST_BITS = 1e-6
"""Relative difference of float32 sums and products that were computed in another order."""


@dataclass(frozen=True)
class Loss:
    """Something that the other format does not keep.

    Attributes:
        name: the linear, or that which fills a cache.
        what: what is lost, without numbers, so that equal losses of many linears are told once.
        detail: numbers of this one.
        hint: what to do.
    """

    name: str
    what: str
    detail: str = ""
    hint: str = ""


def told_once(losses: list[Loss]) -> list[Diagnostic]:
    """The losses, one diagnostic for each kind."""
    kinds: dict[str, list[Loss]] = defaultdict(list)
    for loss in losses:
        kinds[loss.what].append(loss)
    return [
        Diagnostic(
            f"{same[0].name}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: {what}"
            + (f" ({same[0].detail})" if same[0].detail else ""),
            hint=same[0].hint,
        )
        for what, same in kinds.items()
    ]


def unexplained(
    saver: Saver, stored: str, module: QuantizedLinear, tensors: Mapping[str, Tensor], dtype: str
) -> Iterator[Loss]:
    """What of the stored tensors their linear does not say: encoded again, it must give them.

    Args:
        saver: writes as the one that wrote them.
        stored: the linear's stored name.
        module: what was decoded from them.
        tensors: by name.
        dtype: that of the model.
    """
    again = dict(saver.encode(stored, module, dtype))
    for name, tensor in tensors.items():
        part = name.removeprefix(f"{stored}.")
        hint = "another tool put something into it, such as a bias, or it is damaged; `modelslim verify` says more"
        if name not in again:
            if tensor.to(torch.float32).any():
                yield Loss(stored, f"{part} holds what nothing else of the linear explains", hint=hint)
            continue
        floats = tensor.is_floating_point() and again[name].is_floating_point()
        # Other tools may store floats in more bits than the saver; the decoded linear has all of them.
        held = tensor.to(again[name].dtype) if floats else tensor
        different = _different(held, again[name], _LAST_BITS if floats else 0.0)
        if different:
            what = f"{part} is not what the linear's other tensors give"
            yield Loss(stored, what, f"{different} of {tensor.numel()} values differ", hint)


def lost(saver: Saver, linear: LinearInfo, module: QuantizedLinear, dtype: str, folder: Path) -> Iterator[Loss]:
    """What a format does not keep of a linear, or its engine rounds.

    Args:
        saver: of the format.
        linear: the linear.
        module: as it is in the source.
        dtype: that of the model.
        folder: a directory of its own for a checkpoint of this linear alone, without weights.
    """
    rounded = set()
    for field, held, kept in _held_scales(saver, module, dtype):
        scale: Tensor = getattr(module, field)
        if count := _different(scale, kept):
            rounded.add(field)
            yield Loss(
                linear.stored,
                f"its {_FIELDS[field]} are no {held} numbers, and the format's engine holds them as such",
                f"{count} of {scale.numel()}, rounded by up to {_relative(scale, kept):.2g}",
                _ROUND,
            )
    again = _round_trip(saver, linear, module, dtype, folder)
    if _meaning(again.spec) != _meaning(module.spec):
        yield Loss(linear.stored, f"{module.spec.scheme} would come back as {again.spec.scheme}")
        return
    for field, words in _FIELDS.items():
        before, after = getattr(module, field), getattr(again, field)
        if field in rounded or (before is None and after is None):
            continue
        if before is None or after is None:
            present = after if before is None else before
            if field in _ZERO_WHEN_ABSENT and not present.any():
                continue
            yield Loss(linear.stored, f"the format does not keep the {words}")
        elif count := _different(before, after):
            yield Loss(linear.stored, f"the format does not keep the {words}", f"{count} of {before.numel()} differ")


def round_scales(saver: Saver, module: QuantizedLinear, dtype: str) -> float:
    """Round the scales of a linear to what a format's engine holds; codes stay.

    Args:
        saver: of the format.
        module: the linear, which is changed.
        dtype: that of the model.

    Returns:
        The largest relative change of a scale.
    """
    change = 0.0
    for field, _, kept in _held_scales(saver, module, dtype):
        change = max(change, _relative(getattr(module, field), kept))
        setattr(module, field, kept)
    return change


def _held_scales(saver: Saver, module: QuantizedLinear, dtype: str) -> Iterator[tuple[str, str, Tensor]]:
    """Field, dtype and values of each scale as the engine holds it."""
    dtypes = saver.scale_dtypes(module.spec, dtype)
    operands = (("scale", module.spec.weight, dtypes[0]), ("input_scale", module.spec.activation, dtypes[1]))
    for field, operand, held in operands:
        scale: Tensor | None = getattr(module, field)
        if scale is not None and operand.dtype not in MICROSCALING:  # these have a type of scale of their own
            yield field, held, scale.to(getattr(torch, held)).to(torch.float32)


def lost_of_caches(
    saver: Saver,
    caches: Mapping[str, QuantizedCache],
    model: PlannedModel,
    records: Sequence[TensorRecord],
    folder: Path,
) -> Iterator[Loss]:
    """What a format does not keep of key/value caches, or its engine rounds.

    Args:
        saver: of the format, whose ``check`` has nothing against the model.
        caches: as they are in the source, by the names of their places.
        model: the planned model.
        records: what is written of it, the caches included.
        folder: a directory of its own for the files beside the weights.
    """
    held = saver.cache_scale_dtype(model.dtype)
    tensors: dict[str, Tensor] = {}
    for place, module in caches.items():
        tensors |= saver.encode_cache(model.caches[place], module, model.dtype)
    with _files_of(saver, model, records, folder):
        saved = saver.read_caches(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for place, module in caches.items():
        cache = model.caches[place]
        kept = module.scale.to(getattr(torch, held)).to(torch.float32)
        if count := _different(module.scale, kept):
            yield Loss(
                cache.stored,
                f"the scales of the cache that it fills are no {held} numbers, and the format's engine holds them so",
                f"{count} of {kept.numel()}, rounded by up to {_relative(module.scale, kept):.2g}",
                _AGAIN,
            )
            continue
        again = saved[cache.stored].decode({name: tensors[name] for name in saved[cache.stored].tensors})
        for field in ("scale", "offset"):
            before, after = (getattr(one, field).expand(cache.channels) for one in (module, again))
            if _different(before, after):
                yield Loss(cache.stored, f"the format does not keep the {field} of the cache that it fills")


def as_plain_cache(module: QuantizedCache) -> QuantizedCache:
    """The cache with the simplest spec that says the same: what formats spread over channels is put together again."""
    spec, scale, offset = module.spec, module.scale, module.offset
    if not offset.any():
        spec = replace(spec, symmetric=True)
    if spec.scope == "per_channel" and (scale == scale[0]).all() and (offset == offset[0]).all():
        spec, scale, offset = replace(spec, scope="per_tensor"), scale[:1], offset[:1]
    return QuantizedCache(spec, scale, offset)


def _round_trip(saver: Saver, linear: LinearInfo, module: QuantizedLinear, dtype: str, folder: Path) -> QuantizedLinear:
    """The linear as a reader of the format sees it."""
    tensors = dict(saver.encode(linear.stored, module, dtype))
    records = [TensorRecord(name, module.spec, tensor.nbytes) for name, tensor in tensors.items()]
    alone = replace(
        _NOTHING,
        dtype=dtype,
        linears={linear.name: linear},
        specs={linear.name: module.spec},
        tensors=frozenset({f"{linear.stored}.weight"}),
    )
    with _files_of(saver, alone, records, folder):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        saved: SavedLinear = saver.read_layout(folder, shapes)[linear.stored]
        return saved.decode({name: tensors[name] for name in saved.tensors})


_NOTHING = PlannedModel({}, "float32", {}, {}, frozenset())


@contextmanager
def _files_of(saver: Saver, model: PlannedModel, records: Sequence[TensorRecord], folder: Path) -> Iterator[None]:
    """The files beside the weights of a checkpoint, for the time of the context."""
    files: dict[str, Any] = {"config.json": saver.edit_config({}, records, model), **saver.finish(records, model)}
    for name, value in files.items():
        write_json(folder / name, value)
    yield
    for name in files:
        (folder / name).unlink()


def _meaning(spec: QuantSpec) -> tuple[object, ...]:
    """What of a spec the values do not say."""
    weight, activation = spec.weight, spec.activation
    symmetric = spec.is_static or activation.symmetric  # a static offset is a value
    parts = (weight.dtype, weight.sparse, weight.group_rows)
    return *parts, activation.dtype, activation.scope, activation.group_size, symmetric


def _different(one: Tensor, other: Tensor, slack: float = 0.0) -> int:
    """How many values of two tensors differ; all when their shapes do."""
    if one.shape != other.shape:
        return max(one.numel(), other.numel())
    if one.dtype == other.dtype and one.dtype.itemsize == 1:  # torch compares no floats of eight bits
        return int((one.view(torch.int8) != other.view(torch.int8)).sum())
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0
    wide, other_wide = one.to(torch.float64), other.to(torch.float64)
    return int(((wide - other_wide).abs() > slack * wide.abs()).sum())


def _relative(exact: Tensor, kept: Tensor) -> float:
    return float(((exact - kept).abs() / exact.abs().clamp(min=1e-30)).max())
