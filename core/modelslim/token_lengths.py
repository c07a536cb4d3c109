# SPDX-License-Identifier: Apache-2.0
"""How many tokens calibration samples have, before a run reads a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modelslim.batches import batched
from modelslim.inputs import model_inputs
from modelslim.sampling import choose_samples, tokens_of

if TYPE_CHECKING:
    from modelslim.session import Session

_MEDIA_SAMPLES = 32


def token_lengths(session: Session, samples: Sequence[Any], calib_length: int | None, *, joined: bool) -> list[int]:
    """Tokens of every model input; where samples hold media, those of some stand for all.

    Args:
        session: the run's hooks.
        samples: the calibration samples.
        calib_length: tokens after which a text is cut; None for never.
        joined: True when texts of equal length pass the model together.

    Raises:
        DatasetError, ModelError: what the adapter says of a sample.
    """
    if not samples:
        return []
    has_media = not all(isinstance(sample, (str, list)) for sample in samples)
    chosen = choose_samples(samples, _MEDIA_SAMPLES) if has_media else samples
    inputs = model_inputs(session, chosen, "cpu", calib_length)
    if len(chosen) < len(samples):
        lengths = [tokens_of(one) for one in inputs]
        return [lengths[index * len(lengths) // len(samples)] for index in range(len(samples))]
    return [tokens_of(one) for one in (batched(inputs) if joined else inputs)]
