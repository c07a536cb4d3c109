# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a tiny model, as its processor would give them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelslim.api import CapabilityError
from modelslim_transformers.tiny_config import FREE_TOKENS, special_tokens

LENGTHS = (9, 14)
"""Words of the inputs, more than the windows of a tiny model hold."""
GRID = (1, 8, 8)
"""Frames and patches of a picture, more than the windows of a tiny tower hold."""

FRAMES = 40
"""Frames of a sound."""


def make_inputs(model: Any) -> list[dict[str, Any]]:
    """Arguments of the model's forward, one mapping per sample; with a picture and a sound where the model takes some.

    Raises:
        CapabilityError: how many tokens a picture becomes is not known for this architecture.
    """
    config = model.config
    taken = set(special_tokens(config.to_dict()))
    count = min(FREE_TOKENS, len(model.get_input_embeddings().weight))
    words = torch.tensor([token for token in range(count) if token not in taken])
    first, second = (words[torch.randint(len(words), (1, length))] for length in LENGTHS)
    if getattr(config, "vision_config", None) is None:
        return [_text(model, first), _text(model, second)]
    count, picture = _picture(config)
    inputs = [_with_file(model, "image", "vision", first, count, picture)]
    if getattr(config, "audio_config", None) is not None:
        count, sound = _sound(model, config)
        inputs.append(_with_file(model, "audio", "audio", second, count, sound))
    return [*inputs, _text(model, second)]


def _text(model: Any, words: Tensor) -> dict[str, Tensor]:
    """A text that is not padded, said so where the model can be told: adapters may ask for it."""
    mask = {"attention_mask": torch.ones_like(words)}
    taken = inspect.signature(type(model).forward).parameters
    return {"input_ids": words, **(mask if "attention_mask" in taken else {})}


def _with_file(
    model: Any, kind: str, frame: str, words: Tensor, count: int, features: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A text with the tokens of a file behind its second word."""
    config = model.config
    token = _first(config, f"{kind}_token_id", f"{kind}_token_index")
    begin, end = (_first(config, f"{frame}_{side}_token_id") for side in ("start", "end"))
    middle = [*([begin] if begin is not None else []), *[token] * count, *([end] if end is not None else [])]
    ids = torch.cat([words[:, :2], torch.tensor([middle]), words[:, 2:]], 1)
    optional = dict.fromkeys(("mm_token_type_ids", "token_type_ids"), (ids == token).long())
    known = inspect.signature(type(model).forward).parameters
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{key: value.to(model.dtype) if value.is_floating_point() else value for key, value in features.items()},
        **{key: value for key, value in optional.items() if key in known},
    }


def _sound(model: Any, config: Any) -> tuple[int, Mapping[str, Tensor]]:
    """How many tokens a sound becomes, and its spectrum."""
    count = int(_sound_lengths(model, config)[-1])
    features = torch.randn(1, config.audio_config.num_mel_bins, FRAMES)
    return count, {"input_features": features, "feature_attention_mask": torch.ones(1, FRAMES, dtype=torch.long)}


def _sound_lengths(model: Any, config: Any) -> Any:
    """What the model itself says: lengths behind the convolutions and, last, behind the tower."""
    frames, name = torch.tensor([FRAMES]), "_get_feat_extract_output_lengths"
    for part in model.modules():
        if hasattr(part, name):
            return getattr(part, name)(frames)
    function = getattr(sys.modules[type(model).__module__], name, None)
    if function is None:
        raise CapabilityError(f"how many tokens a sound becomes is not known for {config.model_type!r}")
    return function(frames, config.audio_config.n_window)


def _picture(config: Any) -> tuple[int, Mapping[str, Tensor]]:
    """How many tokens a picture becomes, and its pixels."""
    vision = config.vision_config
    if hasattr(vision, "temporal_patch_size") and hasattr(vision, "spatial_merge_size"):
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        frames, rows, columns = GRID
        pixels = torch.randn(frames * rows * columns, size)
        count = frames * rows * columns // vision.spatial_merge_size**2
        return count, {"pixel_values": pixels, "image_grid_thw": torch.tensor([GRID])}
    size, patch = (_side(getattr(vision, key, None)) for key in ("image_size", "patch_size"))
    patches = (size // patch) ** 2
    square = {"pixel_values": torch.randn(1, 3, size, size)}
    if hasattr(config, "mm_tokens_per_image"):
        return config.mm_tokens_per_image, square
    if hasattr(config, "downsample_ratio"):
        return int(patches * config.downsample_ratio**2), square
    if config.model_type == "llava":
        return patches + (config.vision_feature_select_strategy == "full"), square
    raise CapabilityError(f"how many tokens a picture becomes is not known for {config.model_type!r}")


def _first(config: Any, *keys: str) -> Any:
    return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)


def _side(size: Any) -> int:
    if size is None:
        raise CapabilityError("its vision tower states no image_size and no patch_size")
    return int(size[0] if isinstance(size, (list, tuple)) else size)
