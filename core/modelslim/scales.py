# SPDX-License-Identifier: Apache-2.0
"""From a range to a scale, from values to codes and back, for every dtype that an operand can become."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modelslim.number_formats import E2M1_LARGEST, E4M3_LARGEST, power_of_two, to_e2m1, to_e4m3
from modelslim.types import TensorSpec

_LEAST_E4M3 = 2.0**-9
_ROUND_UP_FROM = {"mxfp8": 2.0, "mxfp4": 1.75}
"""Mantissa of a block's largest value from which its scale is the next power of two: what rounds to 2 in float4."""


def range_to_scale(
    low: Tensor, high: Tensor, spec: TensorSpec, whole: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset that map the range [low, high] onto the codes of ``spec``.

    Symmetric: ``scale = max(|low|, |high|) / qmax``, with 448 for float8 and 6 for float4 in place of ``qmax``.
    Asymmetric: the range is widened to hold 0, ``scale = (high - low) / (qmax - qmin)``,
    ``offset = qmin - round(low / scale)``. Computed in float32, then rounded to the type in which the engine holds
    it, so that the codes are made for the scale that the engine will use. An empty range gives a scale that is tiny
    and positive, never 0.

    mxfp8 and mxfp4: the power of two for which the largest value lies in the top binade of the codes (OCP
    Microscaling Formats 1.0, section 6.3); in float4 a largest value that would be rounded up beyond it gets the
    next one. nvfp4: a float8 number times ``whole``.

    Args:
        low, high: tensors of one shape, any floating dtype, finite.
        spec: the scheme.
        whole: float32 that broadcasts against ``low``: what ``whole_scale`` gave, for nvfp4.

    Returns:
        scale float32, and offset int8 or None when symmetric; both of the shape of ``low``.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if spec.symmetric:
        return _symmetric_scale(torch.maximum(-low, high), spec, whole), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    exact = (high - low) / (spec.qmax - spec.qmin)
    scale = _as_held(exact, spec)
    if spec.scale_dtype != "float32":
        # 255 steps of a scale that was rounded down would end short of the range: take the next number up.
        above = (scale.to(_dtype(spec)).view(torch.int16) + 1).view(_dtype(spec)).to(torch.float32)
        scale = torch.where(scale < exact, above, scale)
    offset = (spec.qmin - (low / scale).round_()).clamp_(spec.qmin, spec.qmax)
    return scale, offset.to(torch.int8)


def whole_scale(absmax: Tensor) -> Tensor:
    """The scale that all blocks of an nvfp4 tensor share: float32 of the shape of ``absmax``, its largest magnitude."""
    tiny = torch.finfo(torch.float32).tiny
    return (absmax.to(torch.float32) / (E4M3_LARGEST * E2M1_LARGEST)).clamp(min=tiny / _LEAST_E4M3)


def _symmetric_scale(absmax: Tensor, spec: TensorSpec, whole: Tensor | None) -> Tensor:
    if spec.dtype in _ROUND_UP_FROM:
        largest = E4M3_LARGEST if spec.element == "e4m3" else E2M1_LARGEST
        top = float(power_of_two(torch.tensor(largest)))
        return power_of_two(absmax / top, _ROUND_UP_FROM[spec.dtype])
    if spec.dtype == "nvfp4":
        if whole is None:
            raise ValueError("nvfp4 scales are relative to the one of the whole tensor")
        share = to_e4m3(absmax / E2M1_LARGEST / whole).to(torch.float32)
        return share.clamp_(min=_LEAST_E4M3) * whole
    return _as_held(absmax / (spec.qmax if spec.is_integer else E4M3_LARGEST), spec)


def _as_held(scale: Tensor, spec: TensorSpec) -> Tensor:
    """The scale rounded to the type in which the engine holds it, and positive, in float32."""
    # `tiny` is the smallest normal number: engines may flush what lies below it to zero.
    return scale.to(_dtype(spec)).to(torch.float32).clamp_(min=torch.finfo(_dtype(spec)).tiny)


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.scale_dtype)
    return dtype


def to_codes(values: Tensor, spec: TensorSpec) -> Tensor:
    """The nearest codes of values that are already divided by their scale, offset added.

    Returns:
        int8 for integers and for float4, whose codes are its values doubled; float8_e4m3fn for float8.
    """
    if spec.element == "e4m3":
        return to_e4m3(values)
    if spec.element == "e2m1":
        return to_e2m1(values)
    return values.round().clamp_(spec.qmin, spec.qmax).to(torch.int8)


def from_codes(codes: Tensor, spec: TensorSpec) -> Tensor:
    """What codes stand for, in units of their scale and offset included; float32, fresh memory."""
    values = codes.to(torch.float32, copy=True)
    return values.mul_(0.5) if spec.element == "e2m1" else values


def spread(scale: Tensor, shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
    """The scale of every value of a tensor.

    Args:
        scale: [..., ceil(rows / group_rows), ceil(columns / group_size)], or one for all columns.
        shape: [..., rows, columns].
        spec: the scheme.

    Returns:
        a tensor that broadcasts against the shape.
    """
    if spec.group_rows > 1:
        scale = scale.repeat_interleave(spec.group_rows, -2)[..., : shape[-2], :]
    if spec.group_size is not None and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(spec.group_size, -1)[..., : shape[-1]]
    return scale


def largest_magnitudes(values: Tensor, spec: TensorSpec) -> Tensor:
    """The largest magnitude in each block of rows and columns that share a scale, of the shape of their scales.

    Args:
        values: [..., rows, columns], floating.
        spec: the scheme. Blocks at the ends may be smaller.
    """
    absolute = values.abs()
    size = spec.group_size or values.shape[-1]
    absolute = torch.nn.functional.pad(absolute, (0, -values.shape[-1] % size, 0, -values.shape[-2] % spec.group_rows))
    rows, columns = absolute.shape[-2] // spec.group_rows, absolute.shape[-1] // size
    return absolute.view(*values.shape[:-2], rows, spec.group_rows, columns, size).amax((-3, -1))


def at_run_time(spec: TensorSpec, tokens: int) -> TensorSpec:
    """What ``pd_mix`` is for so many tokens at once: several are a prompt being read, one is being generated."""
    if spec.scope != "pd_mix":
        return spec
    if tokens == 1:
        return replace(spec, scope="per_tensor")
    return replace(spec, scope="per_token", symmetric=True, scale_dtype="float32")


def rounded_inputs(rows: Tensor, spec: TensorSpec, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """What is left of inputs when an engine has quantized them.

    Args:
        rows: float32 [tokens, in].
        spec: how.
        scale, offset: of static activations, float32 and int8 [1]; of nvfp4 the scale of the whole tensor.

    Returns:
        float32 [tokens, in].
    """
    if spec.is_float:
        return rows
    spec = at_run_time(spec, len(rows))
    if spec.scope == "per_tensor":
        assert scale is not None
        scale, offset = scale.view(1, 1), None if spec.symmetric or offset is None else offset.view(1, 1)
    elif spec.symmetric:
        absmax = largest_magnitudes(rows, spec)
        scale = spread(range_to_scale(-absmax, absmax, spec, scale)[0], (len(rows), rows.shape[-1]), spec)
        offset = None
    else:
        scale, offset = range_to_scale(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), spec)
    values = rows / scale
    if offset is not None:
        values = values.round_().add_(offset)
    values = from_codes(to_codes(values, spec), spec)
    return (values if offset is None else values.sub_(offset)).mul_(scale)
