# SPDX-License-Identifier: Apache-2.0
"""Which schemes the format has a type for, and what to take instead of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from modelslim.api import QuantSpec, TensorSpec


class Refusal(NamedTuple):
    """A reason why a scheme cannot be stored.

    Attributes:
        what: the part of the scheme that has no type.
        hint: what is possible.
    """

    what: str
    hint: str


def refusals(spec: QuantSpec) -> Iterator[Refusal]:
    """Everything about the scheme that the format does not have; nothing when it can be stored."""
    weight, activation = spec.weight, spec.activation
    if weight.dtype not in ("int8", "int4"):
        yield Refusal(f"{weight.dtype} weights", "weights become int8 or int4")
        return
    if weight.scope not in ("per_channel", "per_group"):
        yield Refusal(f"{weight.scope} weights", "use scope per_channel or per_group for the weight")
    if activation.is_float:
        return
    if activation.dtype != "int8":
        yield Refusal(f"{activation.dtype} activations", "use int8, or float to quantize the weight only")
    if activation.scope not in ("per_token", "per_tensor"):
        yield Refusal(
            f"{activation.scope} activations", "use scope per_token (dynamic) or per_tensor (static) for the activation"
        )
    if activation.scope == "per_tensor" and weight.dtype == "int4":
        yield Refusal(
            f"int4 weights with static {activation.dtype} activations",
            "use scope per_token for the activation (W4A8_DYNAMIC), or int8 for the weight (W8A8)",
        )
    if activation.scope == "per_token" and not activation.symmetric:
        yield Refusal("asymmetric per_token activations", "use symmetric: true for the activation")
    if weight.scope == "per_group":
        yield Refusal(
            f"{weight.dtype} per_group weights with {activation.dtype} activations",
            "use scope per_channel for the weight, or leave the activation float",
        )
    if not weight.symmetric:
        yield Refusal(
            f"asymmetric weights with {activation.dtype} activations",
            "use symmetric: true for the weight, or leave the activation float",
        )


def describe(spec: QuantSpec | None) -> str:
    """A linear's scheme in the words of a message, such as ``W8A16 (weight per_group 128)``; None is FLOAT."""
    if spec is None:
        return "FLOAT"
    details = [text for text in (_details("weight", spec.weight), _details("activation", spec.activation)) if text]
    return f"{spec.scheme} ({', '.join(details)})" if details else spec.scheme


def _details(operand: str, spec: TensorSpec) -> str:
    words = [f"{spec.scope} {spec.group_size}"] if spec.scope == "per_group" else []
    if not spec.symmetric:
        words.append("asymmetric")
    return " ".join([operand, *words]) if words else ""
