# SPDX-License-Identifier: Apache-2.0
"""Which schemes the format has, and what to take instead of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from modelslim.api import QuantSpec, TensorSpec
from modelslim_compressed_tensors.formats import INTEGERS


class Refusal(NamedTuple):
    """A reason why a scheme cannot be stored, or is run by no engine that reads the format.

    Attributes:
        what: the part of the scheme that is not there.
        hint: what is possible.
    """

    what: str
    hint: str


SCOPES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(INTEGERS, ("per_channel", "per_group")),
    "fp8_e4m3": ("per_channel", "per_block"),
    **dict.fromkeys(("mxfp8", "mxfp4", "nvfp4"), ("per_block",)),
}
"""Scopes of weights, by dtype."""

INPUTS: Mapping[str, tuple[str, ...]] = {
    "int8": ("int8",),
    "int4": ("int8", "fp8_e4m3"),
    **{dtype: (dtype,) for dtype in ("fp8_e4m3", "mxfp8", "mxfp4", "nvfp4")},
}
"""Dtypes that quantized activations have, by that of the weight."""

_BLOCK = 128
"""Rows and columns of the blocks of a float8 weight, and inputs of the groups that go with them."""


def refusals(spec: QuantSpec) -> Iterator[Refusal]:
    """Everything about the scheme that is not there; nothing when it can be stored."""
    weight, activation = spec.weight, spec.activation
    if weight.dtype not in SCOPES:
        yield Refusal(f"{weight.dtype} weights", f"weights become {', '.join(SCOPES)}")
        return
    if weight.scope not in SCOPES[weight.dtype]:
        scopes = " or ".join(SCOPES[weight.dtype])
        yield Refusal(f"{weight.dtype} {weight.scope} weights", f"use scope {scopes} for the weight")
    if (
        weight.scope == "per_block"
        and weight.dtype == "fp8_e4m3"
        and {weight.group_size, weight.group_rows} != {_BLOCK}
    ):
        yield Refusal(
            f"blocks of {weight.group_rows} x {weight.group_size}",
            f"use blocks of {_BLOCK} x {_BLOCK}, which engines run",
        )
    if activation.is_float:
        return
    allowed = INPUTS.get(weight.dtype, ())
    if activation.dtype not in allowed:
        yield Refusal(
            f"{weight.dtype} weights with {activation.dtype} activations",
            f"use {' or '.join(allowed)} for the activation, or float to quantize the weight only"
            if allowed
            else "leave the activation float, or use int8 or int4 for the weight",
        )
    elif activation.is_integer:
        yield from _integer_inputs(weight, activation)
    elif activation.dtype == "fp8_e4m3":
        yield from _float8_inputs(weight, activation)


def _integer_inputs(weight: TensorSpec, activation: TensorSpec) -> Iterator[Refusal]:
    if activation.scope not in ("per_token", "per_tensor"):
        yield Refusal(
            f"{activation.scope} activations", "use scope per_token (dynamic) or per_tensor (static) for the activation"
        )
    if activation.scope == "per_tensor" and weight.dtype == "int4":
        yield Refusal(
            f"int4 weights with static {activation.dtype} activations",
            "use scope per_token for the activation (W4A8_DYNAMIC), or int8 for the weight (W8A8)",
        )
    if activation.scope == "per_token" and not activation.symmetric and weight.dtype == "int4":
        yield Refusal("int4 weights with asymmetric per_token activations", "use symmetric: true for the activation")
    if weight.scope == "per_group" and weight.dtype == "int8":
        yield Refusal(
            f"{weight.dtype} per_group weights with {activation.dtype} activations",
            "use scope per_channel for the weight, or leave the activation float",
        )
    if not weight.symmetric:
        yield Refusal(
            f"asymmetric weights with {activation.dtype} activations",
            "use symmetric: true for the weight, or leave the activation float",
        )


def _float8_inputs(weight: TensorSpec, activation: TensorSpec) -> Iterator[Refusal]:
    if not activation.symmetric:
        yield Refusal("asymmetric float8 activations", "use symmetric: true for the activation")
    if not weight.symmetric:
        yield Refusal("asymmetric weights with float8 activations", "use symmetric: true for the weight")
    if weight.is_integer and activation.scope != "per_token":
        yield Refusal(
            f"{weight.dtype} weights with {activation.scope} float8 activations",
            "use scope per_token for the activation",
        )
    elif weight.scope == "per_block":
        if activation.group_size != _BLOCK:
            yield Refusal(
                f"float8 weights in blocks with {activation.scope} activations",
                f"use groups of {_BLOCK} inputs for the activation, or scope per_channel for the weight",
            )
    elif activation.scope not in ("per_token", "per_tensor"):
        yield Refusal(
            f"float8 per_channel weights with {activation.scope} activations",
            "use scope per_token (dynamic) or per_tensor (static) for the activation",
        )
