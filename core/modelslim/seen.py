# SPDX-License-Identifier: Apache-2.0
"""What algorithms use of an input: calibration must have seen it, and it must have been finite."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.errors import QuantizationError
from modelslim.scales import range_to_scale, whole_scale
from modelslim.statistics import Gram, TensorRange
from modelslim.types import TensorSpec


def no_token(linear: str, unknown: str, instead: str = "") -> QuantizationError:
    """The error for a linear whose input was never seen.

    Args:
        linear: its name.
        unknown: what cannot be known therefore, such as ``its static activation scale``.
        instead: what the user may choose that needs no calibration.
    """
    return QuantizationError(
        f"{linear}: no calibration token reached it, so {unknown} is unknown",
        hint=f"calibrate on more varied data, exclude it, or {instead}"
        if instead
        else "calibrate on more varied data, or exclude it",
    )


def not_finite(name: str, what: str = "input") -> QuantizationError:
    """The error for a linear, or a unit, whose input or output was not finite."""
    return QuantizationError(
        f"{name}: its {what} holds NaN or infinity during calibration",
        hint="run the float model on the same data first; in float16 an overflow is likely, bfloat16 has none",
    )


def seen_range(observed: TensorRange, linear: str, instead: str = "") -> tuple[Tensor, Tensor]:
    """Smallest and largest value of a linear's input, each [1].

    Raises:
        QuantizationError: no token reached the linear, or its input is not finite.
    """
    if observed.minimum is None or observed.maximum is None:
        raise no_token(linear, "its static activation scale", instead)
    low, high = observed.minimum.view(1), observed.maximum.view(1)
    if not (torch.isfinite(low) & torch.isfinite(high)).item():
        raise not_finite(linear)
    return low, high


def seen_gram(observed: Gram, linear: str, instead: str = "") -> Tensor:
    """``X^T X`` of a linear's input, float32 [in, in].

    Raises:
        QuantizationError: no token reached the linear, or its input is not finite.
    """
    if observed.matrix is None:
        raise no_token(linear, "what its errors cost", instead)
    if not observed.matrix.diagonal().isfinite().all():
        raise not_finite(linear)
    return observed.matrix


def static_scale(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and offset int8 [1] of a static activation on a range; the offset of symmetric ones is 0.

    Args:
        low, high: the ends of the range, each [1].
        spec: the activation's.
    """
    if spec.dtype == "nvfp4":
        scale, offset = whole_scale(torch.maximum(-low, high)), None
    else:
        scale, offset = range_to_scale(low, high, spec)
    return scale, torch.zeros_like(scale, dtype=torch.int8) if offset is None else offset
