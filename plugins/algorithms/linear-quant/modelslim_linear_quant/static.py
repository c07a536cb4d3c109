# SPDX-License-Identifier: Apache-2.0
"""The scale of a static activation, from what calibration saw of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelslim.api import QuantizationError, TensorRange, TensorSpec, range_to_scale, whole_scale
from modelslim_linear_quant.histogram import Histogram, best_range


def linear_scale(observed: TensorRange | Histogram, spec: TensorSpec, linear: str) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and offset int8 [1] of the input of a linear: on its range, or on the best part of it.

    Raises:
        QuantizationError: no token reached the linear, or its input is not finite.
    """
    if isinstance(observed, Histogram):
        if observed.counts is None:
            raise no_token(linear, "its static activation scale")
        values, counts = observed.values()
        if not values.isfinite().all():
            raise not_finite(linear)
        low, high = best_range(values, counts, spec)
    else:
        if observed.minimum is None or observed.maximum is None:
            raise no_token(linear, "its static activation scale")
        low, high = observed.minimum.view(1), observed.maximum.view(1)
        if not (torch.isfinite(low) & torch.isfinite(high)).item():
            raise not_finite(linear)
    if spec.dtype == "nvfp4":
        scale, offset = whole_scale(torch.maximum(-low, high)), None
    else:
        scale, offset = range_to_scale(low, high, spec)
    return scale, torch.zeros_like(scale, dtype=torch.int8) if offset is None else offset


def expert_scales(observed: Sequence[TensorRange | Histogram], spec: TensorSpec, bank: str) -> tuple[Tensor, Tensor]:
    """The same for every expert: [experts, 1]."""
    parts = [linear_scale(one, spec, f"{bank}, expert {index}") for index, one in enumerate(observed)]
    scale, offset = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return scale, offset


def no_token(linear: str, unknown: str) -> QuantizationError:
    """The error for a linear whose input was never seen."""
    return QuantizationError(
        f"{linear}: no calibration token reached it, so {unknown} is unknown",
        hint="calibrate on more varied data, exclude it, or choose methods without calibration "
        "(activations per_token, weights minmax, or ssz with error: weight)",
    )


def not_finite(linear: str) -> QuantizationError:
    """The error for a linear whose input was not finite."""
    return QuantizationError(
        f"{linear}: its input holds NaN or infinity during calibration",
        hint="run the float model on the same data first; in float16 an overflow is likely, bfloat16 has none",
    )
