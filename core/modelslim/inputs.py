# SPDX-License-Identifier: Apache-2.0
"""Inputs of the model for calibration: what an adapter makes of the samples, without padding and not too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelslim.errors import CapabilityError
from modelslim.session import Session
from modelslim.vlm_dataset import VlmCalibSample

IDS, MASK = "input_ids", "attention_mask"


def model_inputs(session: Session, samples: Sequence[Any], device: str, length: int | None = None) -> list[Any]:
    """One input per sample, as ``generate_model_forward`` takes it.

    Tokens that the attention mask leaves out are taken out, since statistics would count them like others.

    Args:
        session: the run's hooks.
        samples: the calibration samples.
        device: where the tensors go.
        length: tokens after which a text is cut; samples with images, audio or video stay whole. None for never.

    Raises:
        CapabilityError: inputs are padded, or too long, in a form that is not known.
        DatasetError, PluginError: of the adapter.
    """
    inputs = session.handle_dataset(samples, device)
    if len(inputs) != len(samples):
        raise CapabilityError(
            f"the adapter makes {len(inputs)} inputs of {len(samples)} samples",
            hint="handle_dataset returns one input per sample",
        )
    return [
        cut_input(_unpadded(one, number), None if holds_media(sample) else length, number)
        for number, (sample, one) in enumerate(zip(samples, inputs, strict=True), start=1)
    ]


def holds_media(sample: Any) -> bool:
    """True when a sample names an image, audio or video, among whose tokens no cut may be made."""
    return isinstance(sample, VlmCalibSample) and bool(sample.image or sample.audio or sample.video)


def _unpadded(inputs: Any, number: int) -> Any:
    """The input without the tokens that its attention mask leaves out."""
    mask = _mask(inputs)
    if mask is None or bool(mask.all()):
        return inputs
    kept = mask[0].nonzero().squeeze(-1)
    inner = mask[0, kept.min() : kept.max() + 1] if len(kept) else mask[0]
    if len(mask) != 1 or not bool(inner.all()):
        raise CapabilityError(
            f"calibration sample {number}: the attention mask leaves out tokens that are no padding on one side, or of "
            f"a batch of {len(mask)}",
            hint="handle_dataset of the adapter returns one input of one row per sample",
        )
    return _each_token(inputs, mask.shape[1], lambda tensor: tensor[..., kept.min() : kept.max() + 1])


def _mask(inputs: Any) -> Tensor | None:
    """The attention mask [rows, tokens] of an input, as truth values; None when it has none of this shape."""
    mask = None
    if isinstance(inputs, Mapping):
        mask = inputs.get(MASK)
    elif isinstance(inputs, list | tuple) and len(inputs) == 2:
        ids, mask = inputs  # as adapters of the existing tool have it
        is_mask = isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape
        # Two positions, 0 and 1, would look the same.
        mask = mask if is_mask and mask.shape[-1] > 2 and bool(((mask == 0) | (mask == 1)).all()) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return None
    return mask != 0


def cut_input(inputs: Any, length: int | None, number: int) -> Any:
    """The input with its first tokens only.

    Args:
        inputs: one model input.
        length: how many tokens; None for all.
        number: of the sample, for the error.

    Raises:
        CapabilityError: it is in a form that is not known.
    """
    if length is None:
        return inputs
    ids = inputs.get(IDS) if isinstance(inputs, Mapping) else inputs[0] if isinstance(inputs, list | tuple) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise CapabilityError(
            f"calibration sample {number} cannot be cut: the adapter's inputs have no {IDS} of one row",
            hint="leave --calib_length out, and shorten the texts",
        )
    return inputs if ids.shape[1] <= length else _each_token(inputs, ids.shape[1], lambda tensor: tensor[..., :length])


def _each_token(inputs: Any, count: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The input with every tensor changed that has one integer, or a truth value, per token."""

    def changed(value: Any) -> Any:
        is_per_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == count
        return change(value) if is_per_token and value.dtype in _PER_TOKEN else value

    if isinstance(inputs, Mapping):
        return {key: changed(value) for key, value in inputs.items()}
    return type(inputs)(changed(value) for value in inputs)


_PER_TOKEN = (torch.bool, torch.int32, torch.int64)
