# SPDX-License-Identifier: Apache-2.0
"""Which schemes the format has, and what to take instead of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from modelslim.api import QuantSpec

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Those that GPTQModel reads."""


class Refusal(NamedTuple):
    """A reason why a scheme cannot be stored.

    Attributes:
        what: the part of the scheme that the format has not.
        hint: what is possible.
    """

    what: str
    hint: str


def refusals(spec: QuantSpec) -> Iterator[Refusal]:
    """Everything about the scheme that the format does not have; nothing when it can be stored."""
    weight, activation = spec.weight, spec.activation
    if weight.dtype not in ("int2", "int3", "int4", "int8"):
        yield Refusal(f"{weight.dtype} weights", "use int4 or int8 for the weight")
    if weight.scope not in ("per_channel", "per_group"):
        yield Refusal(f"{weight.scope} weights", "use scope per_channel or per_group for the weight")
    if weight.scope == "per_group" and weight.group_size not in GROUP_SIZES:
        yield Refusal(
            f"groups of {weight.group_size} inputs", f"use a group_size of {', '.join(map(str, GROUP_SIZES))}"
        )
    if not activation.is_float:
        yield Refusal(
            f"{activation.dtype} activations", "leave the activation float, or save in a format that has both"
        )
