# SPDX-License-Identifier: Apache-2.0
"""Whether the numbers of quantized linears are sound: finite, of positive scale, true to format and source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from modelslim.checkpoint import DTYPE_NAMES, Checkpoint
from modelslim.errors import ModelSlimError
from modelslim.quantized import QuantizedLinear
from modelslim.report import REPORT
from modelslim.saver import SavedCache, Saver
from modelslim.types import CacheInfo, LinearInfo, Problem, QuantSpec
from modelslim.verify_structure import Result

_HINT = "the checkpoint is damaged, or was written by a faulty tool; quantize again"
_SLACK = 5.0
_ROUNDING: Mapping[str, float] = {"fp8_e4m3": 0.03, "mxfp8": 0.04, "mxfp4": 0.16, "nvfp4": 0.13}
"""Relative error of rounding normally distributed weights to floating codes, a little more than what is measured."""
_LEAST = 0.02
_SPARSE = 0.04
"""The same of values with two bits of mantissa."""


@dataclass(frozen=True)
class LinearError:
    """How far a quantized weight is from the float one.

    Attributes:
        relative: norm of the difference, divided by the norm of the float weight.
        expected: the same as rounding to nearest would give with these scales.
        rescaled: True when smoothing has multiplied rows or columns, whose factors were taken out.
    """

    relative: float
    expected: float
    rescaled: bool = False

    @property
    def limit(self) -> float:
        """The largest error that rounding can explain."""
        return max(_LEAST, _SLACK * self.expected)


class Numbers:
    """Reads the quantized linears of a result one by one.

    Args:
        result: the checkpoint with what is expected of it.
        checkpoint: its tensors.
        saver: writes as the one that wrote it.
        rescaled: modules whose weights smoothing has changed; None when nobody knows.

    Attributes:
        errors: how far each weight is from the float one, by the linear's name.
        multiplied: names of the linears whose input is multiplied.
    """

    def __init__(
        self, result: Result, checkpoint: Checkpoint, saver: Saver, rescaled: frozenset[str] | None = None
    ) -> None:
        self._result = result
        self._checkpoint = checkpoint
        self._saver = saver
        self._rescaled = rescaled
        self._weights: dict[str, Tensor] = {}
        self.errors: dict[str, LinearError] = {}
        self.multiplied: set[str] = set()
        self._unexplained: list[str] = []

    def check(self, *, compare: bool = True) -> Iterator[Problem]:
        """Everything that is wrong with the numbers.

        Args:
            compare: compare the weights with the float ones, where they are known, and fill ``errors``.
        """
        compare = compare and self._result.expected.source is not None
        for linear in self._result.expected.info.linears.values():
            if linear.stored in self._result.saved:
                yield from self._check_linear(linear, compare)
        self._weights.clear()
        if self._unexplained:
            more = f" and {len(self._unexplained) - 1} more" if len(self._unexplained) > 1 else ""
            yield Problem(
                f"{self._unexplained[0]}{more}: rows or columns are multiplied by factors, as smoothing does it",
                f"there is no {REPORT} that says so; see what made this checkpoint",
                fatal=False,
            )
        for stored, cache in self._result.caches.items():
            yield from self._check_cache(stored, cache)

    def check_floats(self) -> Iterator[Problem]:
        """What is wrong with the tensors that stayed float, which a run checks when it copies them."""
        source = self._result.expected.source
        for name in self._result.tensors:
            if name in self._result.held:
                continue
            try:
                tensor = self._checkpoint.read(name)
            except ModelSlimError as error:
                yield Problem(error.message, _HINT)
                continue
            if source is None or self._rescaled is None or name not in source.tensors:
                continue
            owner = name.rpartition(".")[0]
            if owner not in self._rescaled and not torch.equal(source.read(name).to(tensor.dtype), tensor):
                yield Problem(f"{name} is float and differs from the float model's", _HINT)

    def _check_linear(self, linear: LinearInfo, compare: bool) -> Iterator[Problem]:
        saved = self._result.saved[linear.stored]
        try:
            tensors = {name: self._checkpoint.read(name) for name in saved.tensors}
            module = saved.decode(tensors)
        except (ModelSlimError, RuntimeError, TypeError, ValueError) as error:
            yield Problem(f"{linear.stored} cannot be decoded: {_first_line(error)}", _HINT, linear=linear.name)
            return
        if module.input_multiplier is not None:
            self.multiplied.add(linear.name)
        problems = [*_check_module(linear, module), *self._check_identities(linear, module, tensors)]
        yield from problems
        if compare and not problems:
            yield from self._compare(linear, module)

    def _check_cache(self, stored: str, cache: SavedCache) -> Iterator[Problem]:
        """Scales of a cache, one per channel of the linear that fills it or one for all."""
        linear = self._result.linears.get(stored)
        try:
            tensors = {name: self._checkpoint.read(name) for name in cache.tensors}
            module = cache.decode(tensors)
        except (ModelSlimError, RuntimeError, TypeError, ValueError) as error:
            yield Problem(f"the cache that {stored} fills cannot be decoded: {_first_line(error)}", _HINT)
            return
        if linear is not None:
            channels = linear.out_features
            if module.scale.numel() in (1, channels):
                place = CacheInfo(stored, stored.rpartition(".")[0], stored, linear.unit, 1, channels)
                again = self._saver.encode_cache(place, module, self._result.expected.info.dtype)
                yield from _differences(tensors, dict(again))
            else:
                message = f"the cache that {stored} fills has {module.scale.numel()} scales for {channels} channels"
                yield Problem(message, _HINT)
        if not (torch.isfinite(module.scale).all() and (module.scale > 0).all()):
            yield Problem(f"the cache that {stored} fills has scales that are not finite and positive", _HINT)

    def _check_identities(
        self, linear: LinearInfo, module: QuantizedLinear, tensors: Mapping[str, Tensor]
    ) -> Iterator[Problem]:
        """The module must give back the tensors that it was made of, sums and products that engines need included."""
        dtype = self._result.expected.info.dtype
        try:
            again = dict(self._saver.encode(linear.stored, module, dtype))
        except (ModelSlimError, RuntimeError, TypeError, ValueError) as error:
            yield Problem(f"{linear.stored} contradicts itself: {_first_line(error)}", _HINT, linear=linear.name)
            return
        absent = [name for name in again if name not in tensors]
        for name in absent:
            yield Problem(f"{name} is missing: {module.spec.scheme} has it", _HINT, linear=linear.name)
        yield from _differences(tensors, again, linear.name)

    def _compare(self, linear: LinearInfo, module: QuantizedLinear) -> Iterator[Problem]:
        """The dequantized weight must be the float one within what rounding explains."""
        weight = self._float_weight(linear)
        decoded = module.weight.dequantize()
        if module.input_multiplier is not None:
            decoded = decoded * module.input_multiplier
        error = LinearError(_relative(decoded, weight), _expected(module, weight))
        known = None if self._rescaled is None else linear.module in self._rescaled
        if error.relative > error.limit and known is not False:
            # What smoothing multiplied is compared as it was quantized, behind the multiplication.
            weight = _with_factors(weight, decoded)
            error = LinearError(_relative(decoded, weight), _expected(module, weight), rescaled=True)
        self.errors[linear.name] = error
        if not error.relative <= error.limit:
            yield Problem(
                f"{linear.name}: the dequantized weight differs from the float one by {error.relative:.1%}, and "
                f"rounding to {module.spec.scheme} explains {error.expected:.1%}",
                "codes or scales are not those of this linear",
                linear=linear.name,
            )
        elif error.rescaled and known is None:
            self._unexplained.append(linear.name)

    def _float_weight(self, linear: LinearInfo) -> Tensor:
        """The float weight, float32 [out, in]; that of a layer's experts is read once for all."""
        expected = self._result.expected
        if linear.module not in self._weights:
            self._weights.clear()
            (weight,) = expected.loader.read([f"{linear.module}.weight"]).values()
            self._weights[linear.module] = weight
        weight = self._weights[linear.module]
        if linear.bank:
            bank = expected.info.banks[linear.bank]
            places = (
                (expert, rows)
                for expert, linears in enumerate(bank.linears)
                for one, rows in zip(linears, bank.rows, strict=True)
                if one is linear
            )
            weight = weight[next(places)]
        return weight.to(torch.float32)


def _check_module(linear: LinearInfo, module: QuantizedLinear) -> Iterator[Problem]:
    """What must be true of every quantized linear, whatever the format."""

    def problem(message: str) -> Problem:
        return Problem(f"{linear.stored}: {message}", _HINT, linear=linear.name)

    wanted = (linear.out_features, linear.in_features)
    if (module.out_features, module.in_features) != wanted:
        yield problem(f"its weight is {module.out_features} x {module.in_features}, and the model's {_by(wanted)}")
        return
    weight = module.spec.weight
    if weight.is_float:
        dtype: torch.dtype = getattr(torch, linear.dtype)
    else:
        dtype = torch.int8 if weight.is_integer or weight.bits < 8 else torch.float8_e4m3fn
    if module.codes.dtype is not dtype:
        yield problem(
            f"its codes are {DTYPE_NAMES[module.codes.dtype]}, and those of {weight.dtype} {DTYPE_NAMES[dtype]}"
        )
        return
    if weight.is_integer and weight.bits < 8:
        low, high = torch.aminmax(module.codes)
        if low < weight.qmin or high > weight.qmax:
            yield problem(f"a code of {weight.dtype} is {int(low)} or {int(high)}")
    if linear.has_bias and module.bias is None:
        yield problem("its bias is missing")
    for name, values in (("scale", module.scale), ("input_scale", module.input_scale), ("bias", module.bias)):
        if values is not None and not torch.isfinite(values).all():
            yield problem(f"{name} holds {int((~torch.isfinite(values)).sum())} values that are NaN or infinite")
    bad = module.scale <= 0
    if bad.any():
        # A row of zeros is right with any scale.
        rows = torch.nonzero(bad.any(1)).view(-1).tolist()
        blocks = torch.split(module.codes, module.spec.weight.group_rows)
        rows = [row for row in rows if blocks[row].to(torch.float32).any()]
        if rows:
            yield problem(f"{len(rows)} rows of its scale are not positive, the first is row {rows[0]}")
    if module.input_scale is not None and not (module.input_scale > 0).all():
        yield problem(f"input_scale is {module.input_scale.view(-1)[0]:.3g}, which is not positive")


def _differences(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], linear: str | None = None
) -> Iterator[Problem]:
    """Stored tensors that are not what their linear, or cache, gives."""
    for name in (name for name in wanted if name in tensors):
        if message := _difference(tensors[name], wanted[name]):
            # Engines convert one kind of float to another and lose nothing that counts.
            floats = tensors[name].is_floating_point() and wanted[name].is_floating_point()
            fatal = not (floats and tensors[name].dtype != wanted[name].dtype)
            yield Problem(f"{name} {message}", _HINT, linear=linear, fatal=fatal)


def _difference(stored: Tensor, wanted: Tensor) -> str:
    """How a stored tensor differs from what its linear gives; empty when it does not."""
    if stored.shape != wanted.shape:
        return f"has the shape {list(stored.shape)}, and the format wants {list(wanted.shape)}"
    if stored.dtype != wanted.dtype:
        return f"is {DTYPE_NAMES[stored.dtype]}, and the format wants {DTYPE_NAMES[wanted.dtype]}"
    if stored.data_ptr() == wanted.data_ptr() or torch.equal(stored, wanted):
        return ""
    if not stored.is_floating_point():
        far = (stored.to(torch.int64) - wanted.to(torch.int64)).abs() > (1 if stored.dtype is torch.int32 else 0)
    else:
        far = ~torch.isclose(stored.to(torch.float32), wanted.to(torch.float32), rtol=1e-2, atol=1e-6)
    count = int(far.sum())
    return f"differs in {count} of {far.numel()} values from what the linear's other tensors give" if count else ""


def _expected(module: QuantizedLinear, weight: Tensor) -> float:
    """Relative error of rounding to nearest with these scales."""
    spec: QuantSpec = module.spec
    if spec.weight.is_float:
        # The smallest values are zeros, and what is left makes up for them; another weight would be 1.4 away.
        zeros = int((module.codes == 0).sum())
        smallest = weight.abs().flatten().sort().values[:zeros]
        return min(_SPARSE + float(smallest.norm()) / max(float(weight.norm()), 1e-30), 1.2 / _SLACK)
    if not spec.weight.is_integer:
        return _ROUNDING[spec.weight.dtype]
    columns = module.in_features / module.scale.shape[1]
    squares = float((module.scale.double() ** 2).sum()) * columns * weight.shape[0] / module.scale.shape[0]
    return sqrt(squares / 12) / max(float(weight.norm()), 1e-30)


def _relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _with_factors(wanted: Tensor, actual: Tensor, rounds: int = 3) -> Tensor:
    """``wanted``, its rows and columns multiplied by the factors that bring it nearest to ``actual``."""
    fitted = wanted
    for _ in range(rounds):
        for dim in (0, 1):
            factors = (fitted * actual).sum(dim, keepdim=True) / (fitted * fitted).sum(dim, keepdim=True).clamp(
                min=1e-30
            )
            fitted = fitted * factors
    return fitted


def _first_line(error: Exception) -> str:
    return error.message if isinstance(error, ModelSlimError) else str(error).partition("\n")[0]


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
