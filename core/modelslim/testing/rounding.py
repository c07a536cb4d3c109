# SPDX-License-Identifier: Apache-2.0
"""The plainest quantization of a weight, which contracts compare others with."""

from __future__ import annotations

import torch
from torch import Tensor

from modelslim.quantized import QuantizedTensor
from modelslim.scales import largest_magnitudes, range_to_scale, spread, to_codes, whole_scale
from modelslim.types import TensorSpec


def round_to_nearest(weight: Tensor, spec: TensorSpec) -> QuantizedTensor:
    """A weight [out, in] rounded to nearest on the whole range of each row, group or block."""
    if spec.is_float:
        return QuantizedTensor(weight.detach().clone(), torch.ones(len(weight), 1), None, spec)
    values = weight.detach().to(torch.float32)
    if spec.is_integer:
        groups = values.view(len(values), -1, spec.group_size or values.shape[1])
        scale, offset = range_to_scale(groups.amin(-1), groups.amax(-1), spec)
        steps = (groups / scale.unsqueeze(-1)).round() + (0 if offset is None else offset.unsqueeze(-1))
        return QuantizedTensor(to_codes(steps, spec).flatten(-2), scale, offset, spec)
    absmax = largest_magnitudes(values, spec)
    whole = whole_scale(absmax.amax().view(1)) if spec.dtype == "nvfp4" else None
    scale, _ = range_to_scale(-absmax, absmax, spec, whole)
    return QuantizedTensor(to_codes(values / spread(scale, tuple(values.shape), spec), spec), scale, None, spec, whole)
