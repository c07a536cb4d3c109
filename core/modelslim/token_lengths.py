# SPDX-License-Identifier: Apache-2.0
"""How many tokens calibration samples have, before a run reads a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modelslim.sampling import choose_samples

if TYPE_CHECKING:
    from modelslim.session import Session

_MEDIA_SAMPLES = 32


def token_lengths(session: Session, samples: Sequence[Any]) -> list[int]:
    """Tokens of every calibration sample; where samples hold media, those of some stand for all."""
    has_media = not all(isinstance(sample, (str, list)) for sample in samples)
    chosen = choose_samples(samples, _MEDIA_SAMPLES) if has_media else samples
    lengths = [_length(one) for one in session.handle_dataset(chosen, "cpu")] if chosen else []
    if len(chosen) < len(samples):
        return [lengths[index * len(lengths) // len(samples)] for index in range(len(samples))]
    return lengths


def _length(inputs: Any) -> int:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    tensors = [one for one in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(one, Tensor)]
    ids = next((one for one in tensors if not one.is_floating_point()), tensors[0] if tensors else None)
    if ids is None:
        return 0
    return ids.numel() if not ids.is_floating_point() else ids[..., 0].numel()
