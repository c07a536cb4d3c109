# SPDX-License-Identifier: Apache-2.0
"""Which rows of a linear's weight may be the channels that another linear reads: guesses, to be proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import ExpertLinear

HEAD_SIZES = ("v_head_dim", "head_dim", "head_size", "attention_head_size")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


def head_size(attention: Any) -> int | None:
    """Channels of a head's values; None when the module is no attention."""
    # Other modules keep the whole configuration too, but not this number.
    has_own = any(hasattr(attention, name) for name in HEAD_SIZES)
    return _number(attention, HEAD_SIZES) if has_own and _number(attention, HEADS) else None


def layouts(linear: nn.Module, parent: nn.Module) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Ways in which a linear may hold the values of an attention, or what a gate multiplies, each with its rows.

    Args:
        linear: the source.
        parent: the module that holds it, whose attributes say how many heads there are.

    Returns:
        Names and rows; None for all of them.
    """
    yield "all", None
    if isinstance(linear, ExpertLinear):
        if len(linear.parts) > 1 and "up_proj" in linear.parts:
            yield "up", tuple(range(linear.out_features)[linear.parts["up_proj"]])
        return
    count = int(linear.out_features)  # type: ignore[arg-type]
    rows = torch.arange(count)
    if size := head_size(parent):
        for kind, names in (("key/value heads", KEY_HEADS), ("heads", HEADS)):
            groups = _number(parent, names) or 0
            if count > size * groups > 0:
                yield f"values of {kind} behind the rest", _numbers(rows[count - size * groups :])
                if count % groups == 0:
                    yield f"values of {kind} behind the rest of each", _numbers(rows.view(groups, -1)[:, -size:])
    elif count % 2 == 0:
        yield "second half", _numbers(rows[count // 2 :])
        yield "first half", _numbers(rows[: count // 2])


def spread(scale: Tensor, channels: int, size: int | None) -> Tensor | None:
    """A scale per channel of the source as one per input of a reader, key/value heads repeated for their heads.

    Args:
        scale: [channels of the source].
        channels: inputs of the reader.
        size: channels of a head; None outside an attention.

    Returns:
        [channels]; None when it does not fit.
    """
    count = len(scale)
    if count == channels:
        return scale
    if size is None or count % size or channels % count:
        return None
    return scale.view(-1, size).repeat_interleave(channels // count, 0).reshape(-1)


def _numbers(rows: Tensor) -> tuple[int, ...]:
    return tuple(rows.reshape(-1).tolist())


def _number(module: Any, names: tuple[str, ...]) -> int | None:
    """The first of some sizes that a module states, or its configuration."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None
