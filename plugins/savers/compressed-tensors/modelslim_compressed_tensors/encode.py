# SPDX-License-Identifier: Apache-2.0
"""From a quantized linear to the tensors that store it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modelslim.api import QuantizedLinear, SaveError
from modelslim_compressed_tensors.formats import tensors_of
from modelslim_compressed_tensors.schemes import refusals


def encode(name: str, module: QuantizedLinear, model_dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a linear with their full names; see ``layout`` for dtypes and shapes.

    Raises:
        SaveError: the format does not have the linear's scheme, or no place for a multiplier of its input.
    """
    for refusal in refusals(module.spec):
        raise SaveError(f"{name}: compressed-tensors does not have {refusal.what}", hint=refusal.hint)
    if module.input_multiplier is not None:
        raise SaveError(
            f"{name}: compressed-tensors has no place for a multiplier of a linear's input",
            hint="take non-fusion out of enable_subgraph_type",
        )
    for part, tensor in tensors_of(module, getattr(torch, model_dtype)):
        yield f"{name}.{part}", tensor
