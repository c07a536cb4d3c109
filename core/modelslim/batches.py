# SPDX-License-Identifier: Apache-2.0
"""Texts of equal length pass the model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelslim.sampling import tokens_of

MOST_TOKENS = 4096
"""Of a batch: enough that a kernel's start costs little, few enough that its activations weigh little."""

_KEYS = frozenset({"input_ids", "attention_mask"})


def batched(inputs: Sequence[Any]) -> list[Any]:
    """Join inputs that are texts of equal length.

    What holds more than tokens, such as images or positions of its own, stays as it is: a model may count on
    having such a sample for itself. Nothing is padded.

    Args:
        inputs: model inputs, one for each sample.

    Returns:
        Model inputs, in the order of the first sample of each.
    """
    groups: list[list[Any]] = []
    open_groups: dict[tuple[Any, ...], list[Any]] = {}
    for one in inputs:
        form = _form(one)
        group = open_groups.get(form) if form is not None else None
        if group is None or (len(group) + 1) * tokens_of(one) > MOST_TOKENS:
            group = []
            groups.append(group)
            if form is not None:
                open_groups[form] = group
        group.append(one)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _form(value: Any) -> tuple[Any, ...] | None:
    """What inputs have in common that can be joined; None for one that cannot."""
    if not isinstance(value, Mapping) or "input_ids" not in value or not value.keys() <= _KEYS:
        return None
    if not all(isinstance(one, Tensor) and one.dim() == 2 and len(one) == 1 for one in value.values()):
        return None
    return (type(value), *((key, one.shape, one.dtype) for key, one in value.items()))


def _joined(group: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([one[key] for one in group]) for key in group[0]}
