# SPDX-License-Identifier: Apache-2.0
"""What config.json says of one operand, and what that is in our words: a table with one line a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from modelslim.api import ModelError, TensorSpec, nearest


class Kind(NamedTuple):
    """What config.json says of a dtype.

    Attributes:
        num_bits: bits of a code.
        type: ``int`` or ``float``.
        strategy: who shares a scale, where the dtype says so.
        group_size: how many inputs do, where the dtype says so.
        scale_dtype: what a stored scale is, where the dtype says so.
    """

    num_bits: int
    type: str
    strategy: str | None = None
    group_size: int | None = None
    scale_dtype: str | None = None


KINDS: Mapping[str, Kind] = {
    "int8": Kind(8, "int"),
    "int4": Kind(4, "int"),
    "int3": Kind(3, "int"),
    "int2": Kind(2, "int"),
    "mxfp8": Kind(8, "float", "group", 32, "torch.uint8"),
    "mxfp4": Kind(4, "float", "group", 32, "torch.uint8"),
    "nvfp4": Kind(4, "float", "tensor_group", 16, "torch.float8_e4m3fn"),
    "fp8_e4m3": Kind(8, "float"),
}
"""Every dtype; those that say more stand before those that say less."""

WEIGHTS: Mapping[str, str] = {"per_channel": "channel", "per_group": "group", "per_block": "block"}
INPUTS: Mapping[str, str] = {"per_tensor": "tensor", "per_token": "token", "per_block": "group"}
"""``strategy`` of each scope, for dtypes that do not say it."""


def arguments(spec: TensorSpec, *, inputs: bool) -> dict[str, Any]:
    """The operand as config.json describes it; defaults of the format are written out where readers look at them."""
    kind = KINDS[spec.dtype]
    strategy = kind.strategy or (INPUTS if inputs else WEIGHTS)[spec.scope]
    described: dict[str, Any] = {
        "num_bits": kind.num_bits,
        "type": kind.type,
        "symmetric": spec.symmetric,
        "strategy": strategy,
        "dynamic": inputs and ("local" if strategy == "tensor_group" else strategy != "tensor"),
    }
    if strategy == "block":
        described["block_structure"] = [spec.group_rows, spec.group_size]
    elif spec.group_size is not None:
        described["group_size"] = spec.group_size
    if kind.scale_dtype is not None:
        described |= {"scale_dtype": kind.scale_dtype, "zp_dtype": kind.scale_dtype}
    return described


def parse(described: Mapping[str, Any], place: str, *, inputs: bool) -> TensorSpec:
    """The way back, for any writer's config.json.

    Args:
        described: ``weights`` or ``input_activations`` of a group.
        place: where it stands, for messages.
        inputs: True for the latter.

    Raises:
        ModelError: it is something that is not known here.
    """
    dtype = next((dtype for dtype, kind in KINDS.items() if _is_of(kind, described)), None)
    if dtype is None:
        what = f"{described.get('type', 'int')} of {described.get('num_bits', 8)} bits"
        raise ModelError(f"{place}: {what} is not known here", hint=f"known: {', '.join(KINDS)}")
    spec = _spec(dtype, described, place, INPUTS if inputs else WEIGHTS)
    found, expected = described.get("dynamic") or False, arguments(spec, inputs=inputs)["dynamic"]
    if found != expected:
        strategy = described.get("strategy")
        raise ModelError(f"{place}: dynamic is {found!r}, and only {expected!r} is known with {strategy!r}")
    return spec


def _is_of(kind: Kind, described: Mapping[str, Any]) -> bool:
    if (described.get("num_bits", 8), described.get("type", "int")) != kind[:2]:
        return False
    if kind.strategy is None:
        return True
    # Some writers leave it to the format what a scale of float4 is; float8 in groups may be of either kind.
    scale = described.get("scale_dtype") or (kind.scale_dtype if kind.num_bits == 4 else None)
    return (described.get("strategy"), described.get("group_size"), scale) == kind[2:]


def _spec(dtype: str, described: Mapping[str, Any], place: str, strategies: Mapping[str, str]) -> TensorSpec:
    symmetric, size = described.get("symmetric", True), described.get("group_size")
    if KINDS[dtype].strategy is not None:
        return TensorSpec(dtype, "per_block", symmetric, size)
    strategy = described.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    scope = next((scope for scope, known in strategies.items() if known == strategy), None)
    if scope is None:
        hint = nearest(str(strategy), strategies.values()) or f"known: {', '.join(strategies.values())}"
        raise ModelError(f"{place}: the strategy {strategy!r} is not known here", hint=hint)
    if strategy == "block":
        match described.get("block_structure"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return TensorSpec(dtype, scope, symmetric, columns, group_rows=rows)
        raise ModelError(f"{place}: block_structure is {described.get('block_structure')!r}, not two numbers")
    if strategy != "group":
        return TensorSpec(dtype, scope, symmetric)
    if not (isinstance(size, int) and size > 0):
        raise ModelError(f"{place}: the strategy is 'group', and group_size is {size!r}")
    return TensorSpec(dtype, scope, symmetric, size)
