# SPDX-License-Identifier: Apache-2.0
"""What algorithms use of an input must have been seen and be finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelslim.api import Gram, QuantizationError, TensorRange, TensorSpec, seen_gram, seen_range, static_scale


def ranged(values: list[float]) -> TensorRange:
    found = TensorRange()
    found.update(torch.tensor([values]))
    return found


def test_what_was_seen_is_given() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    gram = Gram()
    gram.update(x)
    assert torch.equal(seen_gram(gram, "layer.q"), x.t() @ x)
    low, high = seen_range(ranged([-2.0, 0.0, 5.0]), "layer.q")
    assert (low.tolist(), high.tolist()) == ([-2.0], [5.0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(QuantizationError, match=r"layer\.q: its input holds NaN or infinity"):
        seen_range(ranged([value]), "layer.q")
    gram = Gram()
    gram.update(torch.tensor([[1.0, value]]))
    with pytest.raises(QuantizationError, match=r"layer\.q: its input holds NaN or infinity"):
        seen_gram(gram, "layer.q")


def test_what_was_not_seen_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.q: no calibration token reached it") as told:
        seen_range(TensorRange(), "layer.q")
    assert told.value.hint == "calibrate on more varied data, or exclude it"
    with pytest.raises(QuantizationError, match="what its errors cost is unknown") as told:
        seen_gram(Gram(), "layer.q", "round to nearest")
    assert told.value.hint == "calibrate on more varied data, exclude it, or round to nearest"


@pytest.mark.parametrize(
    ("spec", "scale", "offset"),
    [
        (TensorSpec("int8", "per_tensor", symmetric=True), 5 / 127, 0),
        (TensorSpec("int8", "per_tensor", symmetric=False), 7 / 255, -55),  # -128 - round(-2 / (7 / 255))
    ],
    ids=["symmetric", "asymmetric"],
)
def test_a_range_becomes_a_static_scale(spec: TensorSpec, scale: float, offset: int) -> None:
    ends: tuple[Tensor, Tensor] = seen_range(ranged([-2.0, 5.0]), "layer.q")
    found, shift = static_scale(*ends, spec)
    assert found.item() == pytest.approx(scale)
    assert (shift.dtype, shift.tolist()) == (torch.int8, [offset])
