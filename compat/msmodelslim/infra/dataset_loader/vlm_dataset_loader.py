# SPDX-License-Identifier: Apache-2.0
"""A sample of multimodal calibration data."""

from __future__ import annotations

from modelslim.api import CapabilityError, VlmCalibSample

__all__ = ["VLMDatasetLoader", "VlmCalibSample"]


class VLMDatasetLoader:
    """A name that adapters import; the data is read before ``handle_dataset`` is called, which gets the samples."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise CapabilityError(
            "VLMDatasetLoader cannot be used: ModelSlim reads the calibration data itself",
            hint="take the samples that handle_dataset gets",
        )
