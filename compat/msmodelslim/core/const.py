# SPDX-License-Identifier: Apache-2.0
"""The devices by the names that adapters use."""

from __future__ import annotations

from enum import Enum


class DeviceType(str, Enum):
    """Kind of a device; its value is what ``Tensor.to`` takes.

    The bridge always passes ``CPU``: the engine, not the adapter, puts tensors on the device of the run.
    """

    NPU = "npu"
    CPU = "cpu"
    CUDA = "cuda"
