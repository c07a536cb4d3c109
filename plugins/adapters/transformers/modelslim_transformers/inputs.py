# SPDX-License-Identifier: Apache-2.0
"""Calibration samples become model inputs: text by the tokenizer, images, audio and video by the processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelslim.api import CapabilityError, DatasetError, InvalidDatasetError, VlmCalibSample

PARTS: Mapping[str, Sequence[str]] = {
    "image": ("image_processor",),
    "audio": ("feature_extractor", "audio_processor"),
    "video": ("video_processor",),
}
"""By modality, the attributes of a processor of which one handles it."""


def media(sample: Any) -> dict[str, str]:
    """The files of a sample by modality; empty when it is text."""
    if not isinstance(sample, VlmCalibSample):
        return {}
    paths = {modality: getattr(sample, modality) for modality in PARTS}
    return {modality: path for modality, path in paths.items() if path is not None}


def require_modalities(dataset: Sequence[Any], processor: Any) -> None:
    """Refuse samples that the model's processor cannot take, before the first is read.

    Args:
        dataset: the samples.
        processor: the model's processor; None when the model takes text alone.

    Raises:
        InvalidDatasetError: the model takes no such files.
        CapabilityError: it does, but its processor lacks the part, because a package is not installed.
    """
    found = {modality: (number, path) for number, modality, path in reversed(list(_numbered(dataset)))}
    for modality, (number, path) in found.items():
        parts = [getattr(processor, name) for name in PARTS[modality] if hasattr(processor, name)]
        if not parts:
            raise InvalidDatasetError(
                f"calibration sample {number} holds {path}, and the model takes no {modality}",
                hint=f"leave out the samples with {modality}",
            )
        if parts[0] is None:
            raise CapabilityError(
                f"calibration sample {number} holds {path}, and transformers needs torchvision for {modality}",
                hint=f"install the torchvision that fits torch, or leave out the samples with {modality}",
            )


def _numbered(dataset: Sequence[Any]) -> Iterator[tuple[int, str, str]]:
    for number, sample in enumerate(dataset, start=1):
        for modality, path in media(sample).items():
            yield number, modality, path


def tokenize(tokenizer: Any, sample: Any, number: int) -> list[int]:
    """Token ids of a text or of a chat, the ``number``-th sample.

    Raises:
        DatasetError: the tokenizer has no chat template, or the template refuses the chat.
    """
    if isinstance(sample, str):
        return list(tokenizer(sample)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise _no_template("tokenizer")
    try:
        return list(tokenizer.apply_chat_template(sample, return_dict=True)["input_ids"])
    except Exception as error:  # a template is a program of the model's publisher and raises what it likes
        raise DatasetError(
            f"calibration sample {number}: the tokenizer's chat template refuses it: {first_line(error)}",
            hint="check its roles and their order; some models take no system message",
        ) from error


def process(
    processor: Any, messages: Sequence[Mapping[str, Any]], prompt: bool, number: int, dtype: torch.dtype
) -> dict[str, Any]:
    """All that the model's processor makes of a chat, with its images, audio and video.

    Args:
        processor: the model's processor.
        messages: the chat; each content is a list of parts.
        prompt: append what begins the model's answer.
        number: of the sample, for messages.
        dtype: of the model.

    Returns:
        Arguments of the model's forward; features of images and audio in the model's dtype.

    Raises:
        CapabilityError: a package is missing that reads such files.
        DatasetError: the processor has no chat template, or refuses the chat or a file.
    """
    if getattr(processor, "chat_template", None) is None:
        raise _no_template("processor")
    try:
        made = processor.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except ImportError as error:
        raise CapabilityError(
            f"calibration sample {number}: transformers lacks a package: {first_line(error)}",
            hint="install it, or leave out the samples with this kind of file",
        ) from error
    except Exception as error:  # templates, image, audio and video libraries raise what they like
        raise DatasetError(
            f"calibration sample {number}: the model's processor refuses it: {first_line(error)}",
            hint="check that its files are whole and of a usual kind",
        ) from error
    return {key: _in_dtype(value, dtype) for key, value in made.items()}


def to_device(value: Any, device: str) -> Any:
    """Tensors on the device, anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    # Not all models convert features themselves. Times and scales of a whole image are vectors and stay exact.
    convert = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return value.to(dtype) if convert else value


def _no_template(owner: str) -> DatasetError:
    hint = "use samples of plain text" if owner == "tokenizer" else "add chat_template.jinja of the model's publisher"
    return DatasetError(f"a calibration sample holds chat messages and the {owner} has no chat template", hint=hint)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which is often a page; with the next where the first announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}".strip() if first.endswith(":") else first
