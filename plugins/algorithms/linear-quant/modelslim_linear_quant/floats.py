# SPDX-License-Identifier: Apache-2.0
"""Weights as float8 and float4 numbers: the scale of each block, and the nearest codes.

mxfp8 and mxfp4 follow the OCP Microscaling Formats specification 1.0 (2023), whose scales are powers of two; which
power is best is what the methods differ in. ``fouroversix`` is that of Cook et al., "Four Over Six: More Accurate
NVFP4 Quantization with Adaptive Block Scaling" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modelslim.api import (
    QuantizedTensor,
    TensorSpec,
    from_codes,
    largest_magnitudes,
    one_thread,
    range_to_scale,
    spread,
    to_codes,
    whole_scale,
)
from modelslim_linear_quant.config import WeightMethod

_BLOCK = 1 << 20  # values worked on at once: 4 MiB of float32 stay in the cache
_LEAST = 2.0**-126

Candidates = Callable[[Tensor, Tensor | None], Sequence[Tensor]]
"""Scales that are tried, from the largest magnitudes of blocks and the scale of the whole tensor."""


def quantize(
    weight: Tensor, spec: TensorSpec, method: WeightMethod, energy: Tensor | None = None, whole: Tensor | None = None
) -> QuantizedTensor:
    """Quantize a weight to nearest.

    Args:
        weight: [out, in] or, of fused experts, [experts, out, in]; floating, finite.
        spec: of a floating dtype.
        method: ``minmax`` takes the scale that holds the largest value of each block; the others try several and
            take the one with the least squared error of the block.
        energy: [in] or [experts, in], the sum of squares of each input, with which errors are weighed; None to
            count all alike.
        whole: float32 [1] or [experts, 1], for nvfp4: the largest magnitude of all weights that share a scale of
            the whole; None for that of this weight.
    """
    if spec.dtype == "nvfp4" and whole is None:
        whole = weight.abs().flatten(-2).amax(-1, keepdim=True).to(torch.float32)
    shared = None if whole is None else whole_scale(whole)
    codes = torch.empty_like(
        weight,
        dtype=torch.float8_e4m3fn if spec.element == "e4m3" else torch.int8,
        memory_format=torch.contiguous_format,
    )
    if weight.ndim == 2:
        scale = _quantize_rows(weight, codes, spec, _candidates(weight, spec, method), energy, shared)
    else:
        scale = torch.stack(
            [
                _quantize_rows(
                    one,
                    codes[index],
                    spec,
                    _candidates(one, spec, method),
                    None if energy is None else energy[index],
                    None if shared is None else shared[index],
                )
                for index, one in enumerate(weight)
            ]
        )
    return QuantizedTensor(codes, scale, None, spec, shared)


def _quantize_rows(
    weight: Tensor,
    codes: Tensor,
    spec: TensorSpec,
    candidates: Candidates,
    energy: Tensor | None,
    whole: Tensor | None,
) -> Tensor:
    """Round [out, in] into ``codes``, some rows at a time; returns the scales."""
    step = max(1, _BLOCK // weight.shape[1] // spec.group_rows) * spec.group_rows
    parts = []
    with one_thread():
        for start in range(0, len(weight), step):
            values = weight[start : start + step].to(torch.float32)
            scales = candidates(largest_magnitudes(values, spec), whole)
            scale = scales[0] if len(scales) == 1 else _best(values, scales, spec, energy)
            codes[start : start + step] = to_codes(values / spread(scale, tuple(values.shape), spec), spec)
            parts.append(scale)
    return torch.cat(parts)


def _best(values: Tensor, scales: Sequence[Tensor], spec: TensorSpec, energy: Tensor | None) -> Tensor:
    """Of each block the scale with the least squared error; of equal ones the first."""
    best, least = scales[0], torch.full_like(scales[0], torch.inf)
    for scale in scales:
        spread_out = spread(scale, tuple(values.shape), spec)
        error = from_codes(to_codes(values / spread_out, spec), spec).mul_(spread_out).sub_(values).square_()
        if energy is not None:
            error *= energy
        total = error.view(*scale.shape, -1).sum(-1)
        best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
    return best


def _candidates(weight: Tensor, spec: TensorSpec, method: WeightMethod) -> Candidates:
    def minmax(absmax: Tensor, whole: Tensor | None) -> Sequence[Tensor]:
        return [range_to_scale(-absmax, absmax, spec, whole)[0]]

    def neighbours(absmax: Tensor, whole: Tensor | None) -> Sequence[Tensor]:
        (scale,) = minmax(absmax, whole)
        return [scale, scale * 2, (scale / 2).clamp(min=_LEAST)]

    def floor_or_ceil(absmax: Tensor, whole: Tensor | None) -> Sequence[Tensor]:
        (scale,) = minmax(absmax, whole)
        return [scale, scale * 2]

    def four_over_six(absmax: Tensor, whole: Tensor | None) -> Sequence[Tensor]:
        if spec.dtype == "nvfp4":
            return [*minmax(absmax, whole), *minmax(absmax * 1.5, whole)]
        return [_nearest_power(absmax / 6), _nearest_power(absmax / 4)]

    def ceil_x(absmax: Tensor, whole: Tensor | None) -> Sequence[Tensor]:
        return [_ceil_power(absmax / bound)]

    bound = method.ceil_x_value
    if method.name == "ceil_x" and method.enable_search:
        bound = _search_bound(weight, spec, method)
    named: dict[str, Candidates] = {
        "minmax": minmax,
        "mse": four_over_six if spec.dtype == "nvfp4" else neighbours,
        "mse_round": floor_or_ceil,
        "fouroversix": four_over_six,
        "ceil_x": ceil_x,
    }
    return named[method.name]


def _ceil_power(values: Tensor) -> Tensor:
    """The least power of two that is not below each value; of zero, the least that is normal."""
    mantissa, exponent = torch.frexp(values)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return _power(torch.where(values > 0, exponent, -126))


def _nearest_power(values: Tensor) -> Tensor:
    """The power of two whose exponent is nearest."""
    mantissa, exponent = torch.frexp(values)
    exponent = torch.where(mantissa >= math.sqrt(0.5), exponent, exponent - 1)
    return _power(torch.where(values > 0, exponent, -126))


def _power(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-126, 127) + 127).to(torch.int32) << 23).view(torch.float32)


def _search_bound(weight: Tensor, spec: TensorSpec, method: WeightMethod) -> float:
    """ceil_x with a search: the bound of the whole tensor that gives the least squared error."""
    bounds = list(_bounds(method))
    errors = torch.zeros(len(bounds), dtype=torch.float64)
    step = max(1, _BLOCK // weight.shape[1])
    with one_thread():
        for start in range(0, len(weight), step):
            values = weight[start : start + step].to(torch.float32)
            absmax = largest_magnitudes(values, spec)
            for index, bound in enumerate(bounds):
                scale = spread(_ceil_power(absmax / bound), tuple(values.shape), spec)
                rounded = from_codes(to_codes(values / scale, spec), spec).mul_(scale)
                errors[index] += rounded.sub_(values).square_().sum(dtype=torch.float64)
    return bounds[int(errors.argmin())]


def _bounds(method: WeightMethod) -> Iterator[float]:
    steps = int((method.search_max - method.search_min) / method.search_step + 1e-9)
    for index in range(steps + 1):
        yield method.search_min + index * method.search_step
