# SPDX-License-Identifier: Apache-2.0
"""The scale of a static activation, from what calibration saw of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelslim.api import TensorRange, TensorSpec, no_token, not_finite, seen_range, static_scale
from modelslim_linear_quant.histogram import Histogram, best_range

UNCALIBRATED = "choose methods without calibration (activations per_token, weights minmax, or ssz with error: weight)"
"""What a linear can do that no token reached."""


def linear_scale(observed: TensorRange | Histogram, spec: TensorSpec, linear: str) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and offset int8 [1] of the input of a linear: on its range, or on the best part of it.

    Raises:
        QuantizationError: no token reached the linear, or its input is not finite.
    """
    if not isinstance(observed, Histogram):
        return static_scale(*seen_range(observed, linear, UNCALIBRATED), spec)
    if observed.counts is None:
        raise no_token(linear, "its static activation scale", UNCALIBRATED)
    values, counts = observed.values()
    if not values.isfinite().all():
        raise not_finite(linear)
    return static_scale(*best_range(values, counts, spec), spec)


def expert_scales(observed: Sequence[TensorRange | Histogram], spec: TensorSpec, bank: str) -> tuple[Tensor, Tensor]:
    """The same for every expert: [experts, 1]."""
    parts = [linear_scale(one, spec, f"{bank}, expert {index}") for index, one in enumerate(observed)]
    scale, offset = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return scale, offset
