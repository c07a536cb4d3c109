# SPDX-License-Identifier: Apache-2.0
"""Which schemes the format has a type for, and what to take instead of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from modelslim.api import QuantSpec, TensorSpec, scheme_in_words
from modelslim_ascendv1.layout import SPARSE


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
    if weight.sparse:
        if spec.scheme not in SPARSE or not weight.symmetric or weight.scope != "per_channel":
            yield Refusal(f"sparse {scheme_in_words(spec)}", "use float_sparse or lowbit_sparse as they are")
        return
    if not weight.is_integer:
        yield from _floating(weight, activation)
        return
    if weight.dtype not in ("int8", "int4"):
        yield Refusal(f"{weight.dtype} weights", "use int8, int4, fp8_e4m3, mxfp8 or mxfp4")
        return
    if weight.scope not in ("per_channel", "per_group"):
        yield Refusal(f"{weight.scope} weights", "use scope per_channel or per_group for the weight")
    if activation.is_float:
        return
    if activation.dtype != "int8" and (activation.dtype, weight.dtype) != ("int4", "int4"):
        yield Refusal(
            f"{weight.dtype} weights with {activation.dtype} activations",
            "use int8 for the activation, or float to quantize the weight only",
        )
    if activation.scope not in ("per_token", "per_tensor", "pd_mix"):
        yield Refusal(
            f"{activation.scope} activations", "use scope per_token (dynamic) or per_tensor (static) for the activation"
        )
    if activation.scope in ("per_tensor", "pd_mix") and weight.dtype == "int4":
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


def _floating(weight: TensorSpec, activation: TensorSpec) -> Iterator[Refusal]:
    """Everything about a scheme with floating codes that the format does not have."""
    if weight.dtype == "fp8_e4m3":
        if weight.scope != "per_channel":
            yield Refusal(f"{weight.scope} fp8_e4m3 weights", "use scope per_channel for the weight")
        if (activation.dtype, activation.scope) != ("fp8_e4m3", "per_token"):
            yield Refusal(
                f"fp8_e4m3 weights with {_words(activation)} activations",
                "use fp8_e4m3 with scope per_token for the activation",
            )
    elif weight.dtype in ("mxfp8", "mxfp4"):
        possible = {"mxfp8": ("mxfp8",), "mxfp4": ("mxfp8", "mxfp4", "float")}[weight.dtype]
        if activation.dtype not in possible:
            yield Refusal(
                f"{weight.dtype} weights with {_words(activation)} activations",
                f"use {' or '.join(possible)} for the activation",
            )
    else:
        yield Refusal(f"{weight.dtype} weights", "use int8, int4, fp8_e4m3, mxfp8 or mxfp4")


def _words(spec: TensorSpec) -> str:
    return "float" if spec.is_float else f"{spec.scope} {spec.dtype}"
