# SPDX-License-Identifier: Apache-2.0
"""Video files as frames."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from modelslim.api import CapabilityError, InvalidDatasetError


def read_frames(path: str, rate: float) -> Any:
    """Frames of a video at even distances.

    Args:
        path: of the file.
        rate: frames per second to take.

    Returns:
        uint8 array [frames, height, width, 3].

    Raises:
        CapabilityError: the package is missing that decodes video.
        InvalidDatasetError: the file holds no video, or is broken.
    """
    from transformers.video_utils import load_video

    if find_spec("av") is None:
        raise CapabilityError(
            f"video {path} needs the package av, which decodes it",
            hint="pip install av, or leave out the samples with video",
        )
    try:
        frames, _ = load_video(path, sample_indices_fn=partial(_indices, rate), backend="pyav")
    except Exception as error:  # the library raises what it likes
        raise InvalidDatasetError(
            f"video {path} cannot be decoded: {error}", hint="replace the file, or leave it out"
        ) from error
    return frames


def _indices(rate: float, metadata: Any, **_: Any) -> Any:
    """Which frames to take: at least one, and none twice."""
    total = metadata.total_num_frames
    count = min(total, max(1, int(total / metadata.fps * rate)))
    return np.arange(count) * total // count
